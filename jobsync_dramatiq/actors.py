"""Which actors of a broker are coordinated, and how their messages get their routes."""
from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any

from jobsync_core.adapter import CoordinatedTasks, Declared, once_of
from jobsync_core.errors import ConfigurationError
from jobsync_core.plugin import PluginSettings

__all__ = ['HOME', 'Actors', 'read_settings']

#: Name of the message option that carries the queue which the actor was declared with.
HOME = 'jobsync_home'


def read_settings(given: Mapping[str, Any]) -> PluginSettings:
    """Settings from `JobSync(…)`, then Django's DRAMATIQ_JOBSYNC or JOBSYNC, then the environment.

    Raises:
        ConfigurationError: A setting cannot work.
    """
    group: object = {}
    if 'django' in sys.modules:
        from django.conf import settings

        if settings.configured or 'DJANGO_SETTINGS_MODULE' in os.environ:  # the module is read when something is asked of it
            group = getattr(settings, 'DRAMATIQ_JOBSYNC', None) or getattr(settings, 'JOBSYNC', None) or {}
    if not isinstance(group, Mapping):
        raise ConfigurationError(f"DRAMATIQ_JOBSYNC={group!r}: give a dict such as {{'database_url': 'postgresql://…'}}")
    found = {**group, **given}
    if 'database_url' in given or 'config' in given:
        # One way of naming the database replaces the other.
        found.pop('config' if 'database_url' in given else 'database_url', None)
    return PluginSettings.read(found)


class Actors(CoordinatedTasks):
    """The coordinated actors of a broker.

    Args:
        broker: The broker.
        settings: The plugin's.
    """

    def __init__(self, broker: Any, settings: PluginSettings) -> None:
        super().__init__(settings, self._declaration, lambda: broker.actors)
        self._broker = broker

    def is_known(self, message: Any) -> bool:
        """Whether this process has the message's actor."""
        return message.actor_name in self._broker.actors

    def route_of(self, message: Any) -> str | None:
        """The route of a message; None where its actor is not coordinated.

        Raises:
            ConfigurationError, TypeError, InvalidTaskId: The arguments make no key.
        """
        found = self.find(message.actor_name)
        return found.route_of(message.args, message.kwargs, message.message_id) if found is not None else None

    def _declaration(self, name: str) -> Declared | None:
        actor = self._broker.actors.get(name)
        if actor is None:
            return None
        return Declared(actor.fn, once_of(actor.fn), actor.options.get('jobsync_key'), actor.options.get('jobsync_pin'))
