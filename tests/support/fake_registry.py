"""What duties read of the database, in memory: the registry of queues and the owner map; and a
clock.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from jobsync_core.store.queues import Orphan
from jobsync_core.worker.duties.duty import Duty, Moment
from jobsync_core.worker.owners import Place

__all__ = ['FakeOwners', 'FakeRegistry', 'Time', 'never']


def never() -> bool:
    """Nothing keeps a duty from going on."""
    return False


@dataclass
class Time:
    """A clock that stands still, and a node under its lease."""

    now: float = 1000.0
    version: int = 1
    leased: bool = True
    leads: bool = True
    nodes: int = 1

    def __call__(self) -> float:
        return self.now

    @property
    def moment(self) -> Moment:
        return Moment(self.now, self.leased, self.version, self.leads, self.nodes)

    def run(self, duty: Duty, stop: Callable[[], bool] = never) -> bool:
        """Run a duty if it is due; whether it was."""
        is_due = duty.due(self.moment) <= 0
        if is_due:
            duty.run(self.moment, stop)
        return is_due


@dataclass
class FakeRegistry:
    """Ages of what nodes left, by node; the queue of `n1` is `q.n1`, for the home queue `home`.

    Attributes:
        gone: Nodes that are gone, and for how many seconds.
        drained: Nodes that live and own nothing.
        back: Nodes that have come back since.
        retired: Nodes that live, and have left their queue alone.
        busy: What others hold.
        held_by_me: What this node has held.
        transactions: How many there were.
        on_hold: Called when several are held.
    """

    gone: dict[str, float] = field(default_factory=dict)
    drained: list[str] = field(default_factory=list)
    back: set[str] = field(default_factory=set)
    retired: set[str] = field(default_factory=set)
    busy: set[str] = field(default_factory=set)
    held_by_me: list[str] = field(default_factory=list)
    transactions: int = 0
    on_hold: Callable[[], object] = lambda: None

    def _left(self, kept: Callable[[float], bool]) -> list[Orphan]:
        self.transactions += 1
        ages = sorted((age, node) for node, age in self.gone.items() if kept(age))
        return [Orphan(f'q.{node}', node, age, 'home') for age, node in ages]

    def orphans(self, young: float) -> list[Orphan]:
        return self._left(lambda age: age < young)

    def old_orphans(self, young: float) -> list[Orphan]:
        return self._left(lambda age: age >= young)

    def draining(self) -> list[Orphan]:
        self.transactions += 1
        return [Orphan(f'q.{node}', node, 0.0, 'home') for node in self.drained]

    def is_gone(self, node: str) -> bool:
        self.transactions += 1
        return node not in self.back | self.retired

    def is_left(self, queue: str) -> bool:
        self.transactions += 1
        return queue.removeprefix('q.') not in self.back

    @contextmanager
    def held(self, node: str) -> Iterator[bool]:
        self.transactions += 1
        if node not in self.busy:
            self.held_by_me.append(node)
        yield node not in self.busy

    @contextmanager
    def all_held(self, orphans: Collection[Orphan]) -> Iterator[frozenset[str]]:
        self.transactions += 2
        self.on_hold()
        nodes = {orphan.queue: orphan.node for orphan in orphans}
        yield frozenset(queue for queue, node in nodes.items() if node not in self.busy | self.back)

    def forget(self, queues: Sequence[str]) -> None:
        self.transactions += 1
        for queue in queues:
            del self.gone[queue.removeprefix('q.')]


class FakeOwners:
    """An owner map. Whatever it has no place for belongs to `n1`, unless it begins with `x`, which
    belongs to nobody.

    Attributes:
        places: By route.
        deserted: Home queues that nobody consumes.
    """

    def __init__(self) -> None:
        self.version = 1
        self.places: dict[str, Place] = {}
        self.deserted: set[str] = set()
        self.rereads = 0
        self.on_reread: Callable[[], object] = lambda: None

    def find(self, route: str, home: str) -> Place:
        if home in self.deserted:
            return Place(deserted=True)
        if route in self.places:
            return self.places[route]
        return Place() if route.startswith('x') else Place('n1', 'q.n1')

    def is_deserted(self, home: str) -> bool:
        return home in self.deserted

    def refresh(self) -> bool:
        return True

    def reread(self) -> bool:
        self.rereads += 1
        self.on_reread()
        return True
