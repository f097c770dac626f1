"""Which actors of a broker are coordinated, and how their messages get their routes."""
from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any

from jobsync_core.errors import ConfigurationError
from jobsync_core.once import ExactlyOnce
from jobsync_core.plugin import PluginSettings
from jobsync_core.routing import Coordination

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


class Actors:
    """The coordinated actors of a broker; built once each.

    Args:
        broker: The broker.
        settings: The plugin's.
    """

    def __init__(self, broker: Any, settings: PluginSettings) -> None:
        self._broker = broker
        self._settings = settings
        self._known: dict[str, Coordination | None] = {}

    def find(self, name: str) -> Coordination | None:
        """How an actor is coordinated; None: it is not, or it is unknown here."""
        if name not in self._known:
            actor = self._broker.actors.get(name)
            if actor is None:
                return None
            self._known[name] = self._build(name, actor)
        return self._known[name]

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

    def pins(self) -> dict[str, tuple[str, ...]]:
        """Pinned actors and their patterns."""
        pins = {name: tuple(patterns) for name, patterns in self._settings.pins.items()}
        for name in list(self._broker.actors):
            found = self.find(name)
            if found is not None and found.pin is not None:
                pins[name] = found.pin
        return pins

    def _build(self, name: str, actor: Any) -> Coordination | None:
        once = getattr(actor.fn, 'exactly_once', None)
        once = once if isinstance(once, ExactlyOnce) else None
        key = actor.options.get('jobsync_key')
        pin = actor.options.get('jobsync_pin') or self._settings.pins.get(name)
        if once is None and key is None and pin is None and self._settings.coordinate != 'all':
            return None
        return Coordination(name, actor.fn, once, key, pin, self._settings.pin_slots)
