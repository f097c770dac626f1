"""The Job of a worker process: what it does to the cluster while it enters."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from ..agent.callbacks import check_release, with_event
from ..assignment.arguments import check_locks
from ..assignment.tokens import TokenSet
from ..belonging import Belonging, Peer, stranger
from ..errors import ConfigurationError
from ..job import Job
from ..logs import get_logger
from ..protocol.effects import RebalanceEvent
from ..store.locks import LockStore
from ..store.queues import QueueStore
from ..store.tables import Tables
from .queue_groups import REMEDY, disagreements
from .routing import pin_locks
from .settings import PluginSettings

__all__ = ['make_job']

logger = get_logger(__name__)

#: Seconds for which a worker waits for the mark of its broker, and between two looks: nodes write
#: it again where it was lost.
_MARK_SEC, _MARK_LOOK_SEC = 15.0, 0.25
#: In place of the mark of a broker that has none, though the others know one: it is another broker.
_NO_MARK = '(none)'


def make_job(
    settings: PluginSettings,
    name: str,
    queues: Mapping[str, str],
    kind: str,
    pins: Mapping[str, Sequence[str]],
    *,
    identify: Callable[[bool], str | None],
    place: str = '',
    application: str = '',
    known: Iterable[str] = (),
    groups: Iterable[str] = (),
    prepare: Callable[[], object],
    ready: Callable[[Job], object] = lambda job: None,
    busy: Callable[[TokenSet], bool],
    on_rebalance: Callable[[RebalanceEvent], object],
    on_release: Callable[[TokenSet], object],
) -> Job:
    """The Job of a worker process, not entered yet.

    Args:
        settings: The plugin's.
        name: The node's name.
        queues: Home queue -> the node's queue for it; recorded before the node owns anything.
        kind: The plugin's name; one cluster has one plugin.
        pins: Pinned tasks.
        identify: Gives the mark of the broker, '' where it has none; makes one where it is asked
            to, else None where there is none yet.
        place: The broker's address, without a password.
        application: What the framework takes for the application's name, unless the settings name
            it.
        known: All tasks of the worker: those that are pinned no longer lose their locks.
        groups: The queue groups that the node belongs to.
        prepare: Makes the node's queues at the broker; called while entering.
        ready: Returns when the worker can take messages; called last, before the node owns
            anything.
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

        def note(belonging: Belonging) -> list[str]:
            """Record the queues; those that were not known before."""
            job.belonging = belonging
            with job.session(pinned=True) as connection:
                store = QueueStore(connection, tables)
                store.identify(name, belonging)
                return [
                    queue
                    for home, queue in queues.items()
                    if store.record(queue, name, home, belonging, settings.group_of(home))
                ]

        def belong(mark: str) -> None:
            belonging = Belonging(kind, mark, place, settings.application or application)
            found = stranger(belonging, others, config.appname)
            if found is not None:
                with job.session(pinned=True) as connection:
                    store = QueueStore(connection, tables)
                    for queue in new:
                        store.withdraw_queue(queue, name)
                    if len(new) == len(queues):
                        store.withdraw(name)
                raise ConfigurationError(found)
            note(belonging)

        # The rows come first: whatever happens next, what is left at the broker is known. And it is
        # what others wait for below: the first plan of a cluster makes workers active that have not
        # recorded yet what they are.
        life = job.incarnation
        new = note(Belonging(kind))
        others = peers()
        limit = time.monotonic() + _MARK_SEC
        while any(not peer.belonging.kind for peer in others) and time.monotonic() < limit:
            job.wait_until(lambda: False, _MARK_LOOK_SEC)
            others = peers()
        belong('')
        prepare()
        belong(_mark_of_broker(job, identify, others))
        with job.session(pinned=True) as connection:
            # What an earlier life of this name had and this one has not, others bring back.
            QueueStore(connection, tables).retire(name, [*queues.values()])
            differ = QueueStore(connection, tables).divided()
        for problem in disagreements(each for each in differ if each.home in queues):
            logger.warning('node=%s %s: %s', name, problem, REMEDY)
        locks = pin_locks(pins, settings.pin_slots)
        if locks:
            with job.session(pinned=True) as connection:
                LockStore(connection, tables).register(check_locks(locks), name, pin=True)
        unpinned = [task for task in known if task not in pins]
        if unpinned:
            with job.session(pinned=True) as connection:
                old = LockStore(connection, tables).clear_old_pins(unpinned)
            if old:
                logger.info(
                    'node=%s removed %d locks of tasks that are pinned no longer', name, old
                )
        if settings.lock_provider is not None:
            settings.lock_provider(job)
        ready(job)
        if job.incarnation != life:
            # It was taken for dead while it waited: its queues may have been deleted.
            note(job.belonging)
            prepare()

    def rebalanced(event: RebalanceEvent) -> None:
        on_rebalance(event)
        if users_rebalance is not None:
            users_rebalance(event)

    def released(tokens: TokenSet) -> Iterator[TokenSet | None]:
        if settings.on_release is not None:
            settings.on_release(tokens)
        on_release(tokens)
        for used in still_in_use(tokens, busy, config.release_timeout_sec):
            yield used
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
        groups=[group for group in groups if group],
    )
    job.belonging = Belonging(kind)
    return job


def still_in_use(
    tokens: TokenSet,
    busy: Callable[[TokenSet], bool],
    timeout: float,
    now: Callable[[], float] = time.monotonic,
) -> Iterator[TokenSet | None]:
    """Which of the tokens that leave are in use, look by look, until none is; None where nothing
    has changed. Work that is running on them ends before another node starts on them; the others
    do not wait for it. Nor does what leaves later: so the first look is told in any case.

    Args:
        tokens: Those that leave.
        busy: Whether work on one of some tokens is running.
        timeout: Seconds after which nobody looks any more; the agent waits no longer than that.
        now: The clock.
    """
    limit = now() + timeout
    told: TokenSet | None = None
    while (used := in_use(told if told is not None else tokens, busy)) and now() < limit:
        yield used if used != told else None
        told = used


def in_use(tokens: TokenSet, busy: Callable[[TokenSet], bool]) -> TokenSet:
    """Which of some tokens are busy; asked by halves, as few are."""
    if not tokens or not busy(tokens):
        return TokenSet()
    if len(tokens) == 1:
        return tokens
    ranges = tokens.ranges
    if len(ranges) == 1:
        first, end = ranges[0]
        middle = (first + end) // 2
        halves = TokenSet([(first, middle)]), TokenSet([(middle, end)])
    else:
        half = len(ranges) // 2
        halves = TokenSet(ranges[:half]), TokenSet(ranges[half:])
    return in_use(halves[0], busy) | in_use(halves[1], busy)


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
