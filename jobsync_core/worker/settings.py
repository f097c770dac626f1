"""The settings of both plugins: from code, the framework's configuration and the environment."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from ..assignment.arguments import check_name, check_number
from ..assignment.tokens import TokenSet
from ..config import CoordinationConfig
from ..environment import from_text
from ..errors import ConfigurationError
from ..job import Job
from .queue_groups import check_queue_groups, group_of
from .routing import check_pins, old_node_queue

__all__ = ['PluginSettings', 'combined']

S = TypeVar('S', bound='PluginSettings')
_JOB_FIELDS = frozenset(item.name for item in fields(CoordinationConfig))
_PREFIX = 'JOBSYNC_'
#: A lock moves its whole token, so that another key on a pinned token goes where the pin goes. With
#: as many tokens as there can be, that befalls one key in 15,000 for each pinned task; tokens cost
#: next to nothing.
_TOTAL_TOKENS = 1_000_000
_NAME_LENGTH = 200


@dataclass(frozen=True, kw_only=True)
class PluginSettings:
    """Settings of a plugin, besides those of CoordinationConfig.

    Args:
        config: The cluster; from `database_url` and the fields of CoordinationConfig.
        node_name: The node's name; None: the adapter's own.
        weight: The node's share relative to the others.
        wait_on_enter: Seconds that entering takes, so that other nodes can register.
        wait_on_exit: Seconds to stay registered, without tokens, when leaving.
        resume: As for Job.
        lock_provider, clear_existing_locks, on_rebalance, on_release: As for Job.
        wait_for_database_sec: Seconds for which a worker that starts waits for a database that
            cannot be reached; 0: it does not wait.
        required: False: a worker that cannot enter runs uncoordinated, and says so.
        coordinate: 'keyed': tasks with a key or a pin; 'all': every task, by its message's id where
            it has no key.
        affinity: False: a message of an `exactly_once` task runs where it is taken from its queue,
            unless the task says otherwise; True: on the node that owns its key.
        pins: Task name -> ordered patterns of the nodes that may run it.
        pin_slots: Virtual keys of a pinned task.
        queue_groups: Name -> queues that share one ring of tokens, so that a key has one owner
            whichever of them it comes through; each other queue is a group of its own.
        on_unclaimed: 'forward' what belongs to another node, or 'drop' it (broadcast queues, where
            every node gets every message).
        max_hops: How often a message is handed on before it is parked.
        park_sec: Seconds for which a message waits in memory for an owner before it goes to the
            parked queue.
        route_producers: Send straight to the owner's queue.
        application: Name of the application; workers of two are not one cluster. Empty: the
            framework's own name of it, if it has one.
        http: Address of a health and metrics server, ':8080'; None: no server.
    """

    config: CoordinationConfig
    node_name: str | None = None
    weight: float = 1.0
    wait_on_enter: float = 0.0
    wait_on_exit: float = 0.0
    resume: bool = False
    lock_provider: Callable[[Job], object] | None = None
    clear_existing_locks: bool = False
    on_rebalance: Callable[..., object] | None = None
    on_release: Callable[[TokenSet], object] | None = None
    wait_for_database_sec: float = 60.0
    required: bool = True
    coordinate: str = 'keyed'
    affinity: bool = True
    pins: Mapping[str, Sequence[str]] = field(default_factory=dict)
    pin_slots: int = 64
    queue_groups: Mapping[str, Sequence[str]] = field(default_factory=dict)
    on_unclaimed: str = 'forward'
    max_hops: int = 4
    park_sec: float = 2.0
    route_producers: bool = True
    application: str = ''
    http: str | int | None = None

    def __post_init__(self) -> None:
        if self.node_name is not None:
            check_name(self.node_name)
            old_node_queue(self.config.appname, self.node_name)  # says what is wrong with the name
        for name, least in (
            ('weight', 1e-6),
            ('wait_on_enter', 0),
            ('wait_on_exit', 0),
            ('park_sec', 0),
            ('wait_for_database_sec', 0),
        ):
            check_number(name, getattr(self, name), least)
        for name, least in (('pin_slots', 1), ('max_hops', 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigurationError(
                    f'{name}={value!r}: give a whole number of at least {least}'
                )
        for name, allowed in (
            ('coordinate', ('keyed', 'all')),
            ('on_unclaimed', ('forward', 'drop')),
        ):
            if getattr(self, name) not in allowed:
                raise ConfigurationError(
                    f'{name}={getattr(self, name)!r}: use one of {", ".join(map(repr, allowed))}'
                )
        if (
            not isinstance(self.application, str)
            or not self.application.isprintable()
            or len(self.application) > _NAME_LENGTH
        ):
            raise ConfigurationError(
                f'application={self.application!r}: give a name of at most {_NAME_LENGTH} '
                'printable characters'
            )
        for name in ('required', 'route_producers', 'clear_existing_locks', 'resume', 'affinity'):
            if not isinstance(getattr(self, name), bool):
                raise ConfigurationError(f'{name}={getattr(self, name)!r}: give True or False')
        if not self.affinity and self.coordinate == 'all':
            raise ConfigurationError(
                "coordinate='all' sends each message to the node that owns it, and affinity=False "
                'lets it run where it is taken: take one of the two out'
            )
        if not self.affinity and self.on_unclaimed == 'drop':
            raise ConfigurationError(
                "on_unclaimed='drop' drops what another node owns, and with affinity=False no node "
                'owns a message, so that all of them would take it up: take one of the two out'
            )
        object.__setattr__(self, 'pins', check_pins(self.pins))
        object.__setattr__(self, 'queue_groups', check_queue_groups(self.queue_groups))

    def group_of(self, home: str) -> str:
        """The queue group of a home queue: its own name, unless the settings say another."""
        return group_of(self.queue_groups, home)

    @classmethod
    def read(cls: type[S], values: Mapping[str, Any], environ: Mapping[str, str] = os.environ) -> S:
        """Settings from a flat mapping; what it lacks comes from `JOBSYNC_DATABASE_URL` and
        `JOBSYNC_<NAME>`.

        Raises:
            ConfigurationError: A name is unknown, a value cannot work, or nothing says where the
                database is.
        """
        own = {item.name: item for item in fields(cls) if item.name != 'config'}
        known = {*own, *_JOB_FIELDS, 'config', 'database_url'}
        for name in values:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                raise ConfigurationError(
                    f'unknown setting {name!r}' + (f': did you mean {near[0]!r}?' if near else '')
                )
        found = {name: value for name, value in values.items() if name in own}
        for name, item in own.items():
            raw = environ.get(_PREFIX + name.upper())
            if (
                raw is not None
                and name not in found
                and isinstance(item.default, (bool, int, float, str))
            ):
                found[name] = from_text(_PREFIX + name.upper(), raw, item.default, whole=True)
        for name in ('node_name', 'http'):
            if environ.get(_PREFIX + name.upper()) and name not in found:
                found[name] = environ[_PREFIX + name.upper()]
        return cls(config=_config(values, environ), **found)


def _config(values: Mapping[str, Any], environ: Mapping[str, str]) -> CoordinationConfig:
    settings = {name: value for name, value in values.items() if name in _JOB_FIELDS}
    given = values.get('config')
    if given is not None:
        if not isinstance(given, CoordinationConfig) or settings or values.get('database_url'):
            raise ConfigurationError(
                'config: give a CoordinationConfig, and neither database_url nor its fields '
                'beside it'
            )
        return given
    url = values.get('database_url')
    if (
        url is None
        and 'host' not in settings
        and not any(environ.get(_PREFIX + name) for name in ('DATABASE_URL', 'HOST', 'DBNAME'))
    ):
        raise ConfigurationError(
            'JobSync does not know its database: give '
            'database_url=postgresql://user:password@host/dbname, or set JOBSYNC_DATABASE_URL'
        )
    without_url = {
        name: value
        for name, value in environ.items()
        if url is None or name != _PREFIX + 'DATABASE_URL'
    }
    if url is not None:
        without_url[_PREFIX + 'DATABASE_URL'] = url
    if _PREFIX + 'TOTAL_TOKENS' not in environ:
        settings.setdefault('total_tokens', _TOTAL_TOKENS)
    return CoordinationConfig.from_env(without_url, **settings)


def combined(configuration: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a framework's configuration and those that the plugin was called with, which
    win. One way of naming the database replaces the other.
    """
    found = {**configuration, **given}
    if 'database_url' in given or 'config' in given:
        found.pop('config' if 'database_url' in given else 'database_url', None)
    return found
