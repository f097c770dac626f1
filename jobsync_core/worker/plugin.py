"""What both queue adapters do alike: their settings, the node's Job with its pins, the gate, and
the counters.
"""

from __future__ import annotations

import difflib
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from ..agent.callbacks import check_release, with_event
from ..assignment.arguments import check_locks, check_name, check_number
from ..assignment.tokens import TokenSet
from ..belonging import Belonging, Peer, stranger
from ..config import CoordinationConfig
from ..errors import ConfigurationError
from ..job import Job
from ..logs import get_logger
from ..protocol.effects import RebalanceEvent
from ..store import locks as lock_store
from ..store.connection import Sessions
from ..store.queues import QueueStore
from ..store.tables import Tables
from .owners import OwnerMap
from .routing import Decision, check_pins, decide, node_queue, pin_locks

__all__ = ['Gate', 'PluginSettings', 'make_job', 'owner_map', 'set_node_of_tests', 'node_of_tests']

logger = get_logger(__name__)

S = TypeVar('S', bound='PluginSettings')
_JOB_FIELDS = frozenset(item.name for item in fields(CoordinationConfig))
_PREFIX = 'JOBSYNC_'
#: A lock moves its whole token, so that another key on a pinned token goes where the pin goes. With
#: as many tokens as there can be, that befalls one key in 15,000 for each pinned task; tokens cost
#: next to nothing.
_TOTAL_TOKENS = 1_000_000
_NAME_LENGTH = 200
#: Seconds for which a worker waits for the mark of its broker, and between two looks: nodes write
#: it again where it was lost.
_MARK_SEC, _MARK_LOOK_SEC = 15.0, 0.25
#: In place of the mark of a broker that has none, though the others know one: it is another broker.
_NO_MARK = '(none)'


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
        pins: Task name -> ordered patterns of the nodes that may run it.
        pin_slots: Virtual keys of a pinned task.
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
    pins: Mapping[str, Sequence[str]] = field(default_factory=dict)
    pin_slots: int = 64
    on_unclaimed: str = 'forward'
    max_hops: int = 4
    park_sec: float = 2.0
    route_producers: bool = True
    application: str = ''
    http: str | int | None = None

    def __post_init__(self) -> None:
        if self.node_name is not None:
            check_name(self.node_name)
            node_queue(self.config.appname, self.node_name)  # says what is wrong with the name
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
        for name in ('required', 'route_producers', 'clear_existing_locks', 'resume'):
            if not isinstance(getattr(self, name), bool):
                raise ConfigurationError(f'{name}={getattr(self, name)!r}: give True or False')
        object.__setattr__(self, 'pins', check_pins(self.pins))

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
                found[name] = _from_text(name, raw, item.default)
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


def _from_text(name: str, raw: str, default: object) -> object:
    if isinstance(default, bool):
        if raw.lower() not in ('1', 'true', 'yes', 'on', '0', 'false', 'no', 'off'):
            raise ConfigurationError(f'{_PREFIX}{name.upper()}={raw!r}: give true or false')
        return raw.lower() in ('1', 'true', 'yes', 'on')
    if isinstance(default, str):
        return raw
    try:
        return int(raw) if isinstance(default, int) else float(raw)
    except ValueError:
        raise ConfigurationError(f'{_PREFIX}{name.upper()}={raw!r}: give a number') from None


def make_job(
    settings: PluginSettings,
    name: str,
    queue: str,
    kind: str,
    pins: Mapping[str, Sequence[str]],
    *,
    identify: Callable[[bool], str | None],
    place: str = '',
    application: str = '',
    known: Iterable[str] = (),
    prepare: Callable[[], object],
    busy: Callable[[TokenSet], bool],
    on_rebalance: Callable[[RebalanceEvent], object],
    on_release: Callable[[TokenSet], object],
) -> Job:
    """The Job of a worker process, not entered yet.

    Args:
        settings: The plugin's.
        name: The node's name.
        queue: The node's queue; recorded before the node owns anything.
        kind: The plugin's name; one cluster has one plugin.
        pins: Pinned tasks.
        identify: Gives the mark of the broker, '' where it has none; makes one where it is asked
            to, else None where there is none yet.
        place: The broker's address, without a password.
        application: What the framework takes for the application's name, unless the settings name
            it.
        known: All tasks of the worker: those that are pinned no longer lose their locks.
        prepare: Makes the node's queue at the broker; called while entering.
        busy: Whether work on one of these tokens is running.
        on_rebalance, on_release: The adapter's signals; the user's callbacks run as well.
    """
    config = settings.config
    tables = Tables.of(config)
    users_rebalance = (
        with_event(settings.on_rebalance) if settings.on_rebalance is not None else None
    )
    if settings.on_release is not None:
        check_release(settings.on_release)

    def provide(job: Job) -> None:
        def peers() -> list[Peer]:
            with job.session(pinned=True) as connection:
                return QueueStore(connection, tables).peers(name, config.heartbeat_timeout_sec)

        def note(belonging: Belonging) -> bool:
            job.belonging = belonging
            with job.session(pinned=True) as connection:
                return QueueStore(connection, tables).record(queue, name, belonging)

        def belong(mark: str) -> None:
            belonging = Belonging(kind, mark, place, settings.application or application)
            found = stranger(belonging, others, config.appname)
            if found is not None:
                if is_new:
                    with job.session(pinned=True) as connection:
                        QueueStore(connection, tables).withdraw(queue, name)
                raise ConfigurationError(found)
            note(belonging)

        # The row comes first: whatever happens next, what is left at the broker is known. And it is
        # what others wait for below: the first plan of a cluster makes workers active that have not
        # recorded yet what they are.
        is_new = note(Belonging(kind))
        others = peers()
        limit = time.monotonic() + _MARK_SEC
        while any(not peer.belonging.kind for peer in others) and time.monotonic() < limit:
            job.wait_until(lambda: False, _MARK_LOOK_SEC)
            others = peers()
        belong('')
        prepare()
        belong(_mark_of_broker(job, identify, others))
        locks = pin_locks(pins, settings.pin_slots)
        if locks:
            with job.session(pinned=True) as connection:
                lock_store.register(connection, tables, check_locks(locks), name, pin=True)
        unpinned = [task for task in known if task not in pins]
        if unpinned:
            with job.session(pinned=True) as connection:
                old = lock_store.clear_old_pins(connection, tables, unpinned)
            if old:
                logger.info(
                    'node=%s removed %d locks of tasks that are pinned no longer', name, old
                )
        if settings.lock_provider is not None:
            settings.lock_provider(job)

    def rebalanced(event: RebalanceEvent) -> None:
        on_rebalance(event)
        if users_rebalance is not None:
            users_rebalance(event)

    def released(tokens: TokenSet) -> None:
        if settings.on_release is not None:
            settings.on_release(tokens)
        on_release(tokens)
        # Work that is running on these tokens ends before another node starts on them; the agent
        # bounds the wait.
        limit = time.monotonic() + config.release_timeout_sec
        while busy(tokens) and time.monotonic() < limit:
            time.sleep(0.02)

    job = Job(
        name,
        config,
        wait_on_enter=settings.wait_on_enter,
        wait_on_exit=settings.wait_on_exit,
        lock_provider=provide,
        clear_existing_locks=settings.clear_existing_locks,
        on_rebalance=rebalanced,
        on_release=released,
        weight=settings.weight,
        resume=settings.resume,
    )
    job.belonging = Belonging(kind)
    return job


def _mark_of_broker(
    job: Job, identify: Callable[[bool], str | None], others: Sequence[Peer]
) -> str:
    """The broker's mark. Where it has none, though others of the cluster know one, they write it
    again soon, if it is the same broker.
    """
    if not any(peer.belonging.broker for peer in others):
        return identify(True) or ''
    limit = time.monotonic() + _MARK_SEC
    while (mark := identify(False)) is None and time.monotonic() < limit:
        job.wait_until(lambda: False, _MARK_LOOK_SEC)
    return mark if mark is not None else _NO_MARK


class Gate:
    """Decides on each message of a node, and counts.

    Args:
        settings: The plugin's.
        job: The node.
    """

    def __init__(self, settings: PluginSettings, job: Job) -> None:
        self.job = job
        self.settings = settings
        tables = Tables.of(settings.config)
        #: Of the gate and of the duties: they hardly ever need one at the same moment.
        self.sessions = Sessions(settings.config, f'jobsync duties {job.node_name}')
        self.owners = OwnerMap(self.sessions, tables)
        self.counts: dict[str, int] = {}
        self._lock = threading.Lock()

    def decide(self, route: str, hops: int) -> Decision:
        """What to do with a message; no I/O while the owner map is as new as the node."""
        mine = self.job.owns(route)
        if mine:
            return decide(
                mine=True, leased=True, node='', owner=None, queue=None, hops=0, max_hops=0
            )
        leased = self.job.am_i_healthy()
        place = None
        if leased:
            if self.owners.version != self.job.token_version:
                self.owners.refresh()
            place = self.owners.find(route)
            if place is not None and place.queue is None:
                place = self.owners.find_fresh(route) or place  # it may have one by now
        return decide(
            mine=False,
            leased=leased,
            node=self.job.node_name,
            owner=place.node if place else None,
            queue=place.queue if place else None,
            hops=hops,
            max_hops=self.settings.max_hops,
            drop=self.settings.on_unclaimed == 'drop',
        )

    def count(self, event: str, number: int = 1) -> None:
        """Count an event, for metrics and `local_status`."""
        with self._lock:
            self.counts[event] = self.counts.get(event, 0) + number


def owner_map(config: CoordinationConfig) -> OwnerMap:
    """An owner map for a producer."""
    return OwnerMap(Sessions(config, 'jobsync producer'), Tables.of(config))


_node_of_tests: Job | None = None


def set_node_of_tests(job: Job | None) -> None:
    """Let a Job, which the caller has entered, stand in for the nodes of this process's workers;
    for `jobsync_core.testing`.
    """
    global _node_of_tests
    _node_of_tests = job


def node_of_tests() -> Job | None:
    """The Job that stands in: a worker then makes no node, routes nothing, and runs all that it
    receives.
    """
    return _node_of_tests
