"""What waits for each queue of the user's, wherever the plugin has put it: in the queue itself, in
the queues of nodes, and parked.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from .. import clock
from ..config import CoordinationConfig
from ..logs import get_logger
from ..store.queues import QueueStore
from ..store.sessions import Sessions
from ..store.tables import Tables
from .routing import home_of_queue, old_parked_queue, parked_queue, unknown_queue

__all__ = [
    'Backlog',
    'BacklogWatch',
    'HomeBacklog',
    'Purged',
    'QueueCount',
    'QueueCounter',
    'gather',
    'purge',
    'read_backlog',
]

logger = get_logger(__name__)

#: Seconds for which an answer over HTTP counts as fresh, however many ask.
_FRESH_SEC = 2.0
#: Seconds after which a scrape has the numbers read anew, and after which old ones are not shown.
_SCRAPE_SEC, _STALE_SEC = 5.0, 120.0
#: Passes over a queue's places: what a worker passes on meanwhile is in another place then.
_PASSES = 3


@dataclass(frozen=True)
class QueueCount:
    """What the broker tells of one queue of its own.

    Attributes:
        ready: Messages that nobody has taken.
        unacknowledged: Messages that somebody has taken and not acknowledged; None: it is not told.
        delayed: Messages that wait beside the queue for their time; None: it is not told.
        oldest_sec: Age of the message that is next, in seconds; None: it is not told.
    """

    ready: int = 0
    unacknowledged: int | None = None
    delayed: int | None = None
    oldest_sec: float | None = None


class QueueCounter(Protocol):
    """The broker, as the backlog needs it. Any thread may use it; it keeps no connection open.

    Whatever the broker's client raises comes out of any method.
    """

    #: The plugin's name.
    kind: str

    def homes(self) -> Iterable[str]:
        """The queues that the application itself names."""

    def count(self, queues: Sequence[str], nodes: Mapping[str, str]) -> Mapping[str, QueueCount]:
        """What is in queues, in few trips; without those that do not exist, as far as that shows.

        Args:
            queues: Names of queues.
            nodes: Queues of nodes, and whose each of them is.
        """

    def purge(self, queue: str) -> int:
        """Delete what is ready in a queue; how many messages. What was taken stays."""


@dataclass(frozen=True)
class HomeBacklog:
    """What waits for one queue of the user's.

    Attributes:
        queue: Its name.
        known: Whether the application, or a node, names it; else only the asker does.
        ready: Messages in it, and in the queues that nodes have for it.
        parked: Messages that no live node may take now.
        unacknowledged: Messages that a worker has taken, those that it is running among them; None:
            the broker does not tell.
        delayed: Messages that wait for their time; None: the broker does not tell.
        oldest_sec: The highest age of what is next in one of its places; None: the broker does not
            tell.
        places: Messages by queue of the broker, empty ones left out.
    """

    queue: str
    known: bool = True
    ready: int = 0
    parked: int = 0
    unacknowledged: int | None = None
    delayed: int | None = None
    oldest_sec: float | None = None
    places: Mapping[str, int] = field(default_factory=dict)

    @property
    def backlog(self) -> int:
        """Messages that nobody has taken."""
        return self.ready + self.parked

    def shown(self) -> dict[str, Any]:
        """It as plain values; `total` counts what workers have taken, too, where that is told."""
        return {
            'queue': self.queue,
            'known': self.known,
            'backlog': self.backlog,
            'total': self.backlog + (self.unacknowledged or 0),
            'ready': self.ready,
            'parked': self.parked,
            'unacknowledged': self.unacknowledged,
            'delayed': self.delayed,
            'oldest_sec': None if self.oldest_sec is None else round(self.oldest_sec, 3),
            'places': dict(self.places),
        }


@dataclass(frozen=True)
class Backlog:
    """What waits, by queue.

    Attributes:
        queues: By home queue, in the order of their names.
        others: Messages in queues of the cluster that belong to no queue in particular: of tasks
            that no worker knows, of nodes that have just gone, and of the layout that knew no queue
            groups; empty ones left out.
    """

    queues: tuple[HomeBacklog, ...]
    others: Mapping[str, int]

    def of(self, queue: str) -> HomeBacklog:
        """That of one queue; an empty one where nobody names it."""
        for each in self.queues:
            if each.queue == queue:
                return each
        return HomeBacklog(queue, known=False)

    def shown(self) -> dict[str, Any]:
        """It as plain values."""
        return {'queues': [each.shown() for each in self.queues], 'others': dict(self.others)}


@dataclass(frozen=True)
class _Places:
    """Which queues of the broker belong to which home."""

    nodes: Mapping[str, Sequence[str]]
    parked: Mapping[str, str]
    others: Sequence[str]


def _places(known: Iterable[str], homes: Iterable[str], appname: str) -> _Places:
    nodes: dict[str, list[str]] = {home: [] for home in homes}
    others = []
    shared = {old_parked_queue(appname), unknown_queue(appname)}
    for queue in sorted(set(known)):
        home = home_of_queue(queue, appname)
        if not home:
            others.append(queue)
        elif queue != parked_queue(home, appname):
            nodes.setdefault(home, []).append(queue)
    return _Places(
        nodes, {home: parked_queue(home, appname) for home in nodes}, sorted({*others, *shared})
    )


def gather(
    counts: Mapping[str, QueueCount],
    known: Iterable[str],
    homes: Iterable[str],
    appname: str,
    asked: str | None = None,
) -> Backlog:
    """Put together what the broker told. Pure.

    Args:
        counts: What is in each queue.
        known: The queues of nodes.
        homes: The queues that the application names.
        appname: The cluster.
        asked: A queue to count, whether anybody names it or not.
    """
    named = set(homes)
    places = _places(known, {*named, *({asked} if asked else ())}, appname)
    return Backlog(
        tuple(
            _home_backlog(
                home,
                [home, *places.nodes[home]],
                places.parked[home],
                counts,
                known=home in named or bool(places.nodes[home]),
            )
            for home in sorted(places.nodes)
        ),
        {queue: found.ready for queue in places.others if (found := _of(counts, queue)).ready},
    )


def _of(counts: Mapping[str, QueueCount], queue: str) -> QueueCount:
    return counts.get(queue) or QueueCount()


def _home_backlog(
    home: str, own: Sequence[str], parked: str, counts: Mapping[str, QueueCount], *, known: bool
) -> HomeBacklog:
    found = {queue: _of(counts, queue) for queue in (*own, parked)}
    return HomeBacklog(
        home,
        known or any(queue in counts for queue in found),
        ready=sum(found[queue].ready for queue in own),
        parked=found[parked].ready,
        unacknowledged=_sum(each.unacknowledged for each in found.values()),
        delayed=_sum(each.delayed for each in found.values()),
        oldest_sec=max(
            (each.oldest_sec for each in found.values() if each.oldest_sec is not None),
            default=None,
        ),
        places={queue: each.ready for queue, each in found.items() if each.ready},
    )


def _sum(numbers: Iterable[int | None]) -> int | None:
    told = [number for number in numbers if number is not None]
    return sum(told) if told else None


def read_backlog(
    counter: QueueCounter, config: CoordinationConfig, asked: str | None = None
) -> Backlog:
    """Count what waits.

    Args:
        counter: The broker.
        config: The cluster.
        asked: Count this queue, too, should nobody name it.

    Raises:
        DatabaseUnavailable: The database, which knows the queues of nodes, cannot be reached.
        Exception: Whatever the broker's client raises.
    """
    known = _known(counter, config)
    homes = set(counter.homes())
    places = _places(known, {*homes, *({asked} if asked else ())}, config.appname)
    names = [
        *places.nodes,
        *(queue for queues in places.nodes.values() for queue in queues),
        *places.parked.values(),
        *places.others,
    ]
    counts = counter.count(names, known)
    return gather(counts, known, homes, config.appname, asked)


def _known(counter: QueueCounter, config: CoordinationConfig) -> dict[str, str]:
    sessions = Sessions(config, 'jobsync backlog')
    try:
        with sessions.session() as connection:
            found = QueueStore(connection, Tables.of(config)).known(counter.kind)
            return {row[0]: row[1] for row in found if row[0]}
    finally:
        sessions.close_all()


@dataclass(frozen=True)
class Purged:
    """What a purge deleted.

    Attributes:
        home: Messages of the queue itself.
        nodes: Messages of the queues that nodes have for it, by queue.
        parked: Messages that were parked.
        unsorted: Messages that stay in queues of the cluster that belong to no queue in particular:
            they may be of any.
    """

    home: int
    nodes: Mapping[str, int]
    parked: int
    unsorted: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.home + sum(self.nodes.values()) + self.parked


def purge(counter: QueueCounter, config: CoordinationConfig, queue: str) -> Purged:
    """Delete what waits for a queue, wherever that is. What workers have taken stays.

    Args:
        counter: The broker.
        config: The cluster.
        queue: The user's queue.

    Raises:
        DatabaseUnavailable: The database, which knows the queues of nodes, cannot be reached.
        Exception: Whatever the broker's client raises.
    """
    known = _known(counter, config)
    places = _places(known, [queue], config.appname)
    parked = places.parked[queue]
    done: dict[str, int] = dict.fromkeys([queue, *places.nodes[queue], parked], 0)
    for _ in range(_PASSES):
        before = sum(done.values())
        for each in done:
            done[each] += counter.purge(each)
        if sum(done.values()) == before:
            break
    unsorted = [name for name in places.others if name != unknown_queue(config.appname)]
    left = counter.count(unsorted, known)
    return Purged(
        home=done[queue],
        nodes={name: done[name] for name in places.nodes[queue]},
        parked=done[parked],
        unsorted=sum(each.ready for each in left.values()),
    )


class BacklogWatch:
    """The backlog, for whoever asks over HTTP: counted for all of them together, and never in the
    way of a scrape.

    Args:
        read: Counts all queues, and one that is asked for besides, should nobody name it.
        now: The clock.
    """

    def __init__(
        self, read: Callable[[str | None], Backlog], now: Callable[[], float] = clock.now
    ) -> None:
        self._read_all = read
        self._now = now
        self._lock = threading.Lock()
        #: When it was counted, for which queue besides the known ones, and the numbers.
        self._last: tuple[float, str | None, Backlog] | None = None
        self._reading = False

    def answer(self, queue: str | None) -> dict[str, Any]:
        """The backlog of one queue, or of all, as plain values, two seconds old at most.

        Raises:
            DatabaseUnavailable: The database cannot be reached.
            Exception: Whatever the broker's client raises.
        """
        found = self._fresh(queue)
        return found.of(queue).shown() if queue is not None else found.shown()

    def _fresh(self, queue: str | None) -> Backlog:
        with self._lock:
            last = self._last
            if last is not None and self._now() - last[0] < _FRESH_SEC:
                _, asked, found = last
                if queue is None or queue == asked or found.of(queue).known:
                    return found
            begun = self._now()
            found = self._read_all(queue)
            self._last = begun, queue, found
            return found

    def latest(self) -> Sequence[HomeBacklog]:
        """What was counted last, for a scrape, which waits for nobody: it is counted anew behind
        it. Nothing where that has not worked for two minutes.
        """
        last, now = self._last, self._now()
        if (last is None or now - last[0] >= _SCRAPE_SEC) and not self._reading:
            self._reading = True
            threading.Thread(target=self._read, name='jobsync-backlog', daemon=True).start()
        return last[2].queues if last is not None and now - last[0] < _STALE_SEC else ()

    def _read(self) -> None:
        try:
            self._fresh(None)
        except Exception as error:  # whatever the broker's client raises: no gauges then
            logger.warning('the backlog cannot be counted for /metrics: %r', error)
        finally:
            self._reading = False
