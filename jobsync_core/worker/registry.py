"""The registry: which node has which queue, and who is gone; in the database, as a broker cannot
tell.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from .. import clock
from ..belonging import Belonging
from ..errors import JobSyncError
from ..store.queues import Orphan, QueueStore
from ..store.sessions import Sessions
from ..store.tables import Tables
from .broker import Broker

__all__ = ['CLOSE_SEC', 'QueueRegistry', 'Registry', 'restore_former_life']

#: Seconds for which what was left is looked after closely: a message may be on its way to it.
CLOSE_SEC = 15.0
#: Seconds for which a new life of a node waits until its former one is swept, and between two
#: looks.
_FORMER_SEC, _TRY_AGAIN_SEC = 60.0, 0.1


class Registry(Protocol):
    """What duties ask of the registry.

    Raises:
        DatabaseUnavailable: From any method: the database fails.
    """

    def orphans(self, young: float) -> list[Orphan]:
        """Queues of nodes that have been gone for less than so many seconds, the newest first."""

    def old_orphans(self, young: float) -> list[Orphan]:
        """Queues of nodes that have been gone for longer, the newest first."""

    def draining(self) -> list[Orphan]:
        """Queues of other nodes that live, drain, and own nothing any more."""

    def is_gone(self, node: str) -> bool:
        """Whether a node is gone."""

    def is_left(self, queue: str) -> bool:
        """Whether the node of a queue is gone, or lives and has left this queue alone."""

    def held(self, node: str) -> AbstractContextManager[bool]:
        """Hold what a node left, '' for what is parked: nobody else sweeps it meanwhile. False
        where somebody does.
        """

    def all_held(self, orphans: Collection[Orphan]) -> AbstractContextManager[frozenset[str]]:
        """Hold what the nodes of these queues left; gives those queues that are held, and left."""

    def forget(self, queues: Sequence[str]) -> None:
        """These queues are gone, and nobody has them."""


class QueueRegistry:
    """The registry of one plugin's nodes.

    Args:
        sessions: Connections to the database.
        tables: Names of the tables.
        kind: The plugin's name.
        node: This node's name.
        group_of: The queue group of a home queue.
    """

    def __init__(
        self,
        sessions: Sessions,
        tables: Tables,
        kind: str,
        node: str,
        group_of: Callable[[str], str] = lambda home: '',
    ) -> None:
        self._group_of = group_of
        self._sessions = sessions
        self._tables = tables
        self._kind = kind
        self._node = node

    def record(self, queues: Mapping[str, str], belonging: Belonging) -> None:
        """Note that this node has these queues, and what it belongs to.

        Args:
            queues: Home queue -> the node's queue for it.
            belonging: What the node belongs to.
        """
        with self._sessions.session() as connection:
            store = QueueStore(connection, self._tables)
            store.identify(self._node, belonging)
            for home, queue in queues.items():
                store.record(queue, self._node, home, belonging, self._group_of(home))

    def retire(self, queues: Sequence[str]) -> None:
        """This node has these queues, and none besides: others that are recorded of it are swept
        as those of nodes that are gone.
        """
        with self._sessions.session() as connection:
            QueueStore(connection, self._tables).retire(self._node, queues)

    def orphans(self, young: float) -> list[Orphan]:
        """As Registry says."""
        with self._sessions.session() as connection:
            return QueueStore(connection, self._tables).orphans(self._kind, young)

    def old_orphans(self, young: float) -> list[Orphan]:
        """As Registry says."""
        with self._sessions.session() as connection:
            return QueueStore(connection, self._tables).old_orphans(self._kind, young)

    def draining(self) -> list[Orphan]:
        """As Registry says."""
        with self._sessions.session() as connection:
            return QueueStore(connection, self._tables).draining(self._kind, self._node)

    def is_gone(self, node: str) -> bool:
        """As Registry says. Never on the connection that holds: read in its transaction, the table
        would be locked against a migration while the broker works.
        """
        with self._sessions.session() as connection:
            return QueueStore(connection, self._tables).is_gone(node)

    def is_left(self, queue: str) -> bool:
        """As Registry says; never on the connection that holds, neither."""
        with self._sessions.session() as connection:
            return bool(QueueStore(connection, self._tables).left([queue]))

    @contextmanager
    def held(self, node: str) -> Iterator[bool]:
        """As Registry says; for as long as the block runs."""
        with self._sessions.session() as connection:
            yield QueueStore(connection, self._tables).hold(node)

    @contextmanager
    def all_held(self, orphans: Collection[Orphan]) -> Iterator[frozenset[str]]:
        """As Registry says; for as long as the block runs."""
        with self._sessions.session() as holding:
            held = QueueStore(holding, self._tables).hold_all({orphan.node for orphan in orphans})
            queues = [orphan.queue for orphan in orphans if orphan.node in held]
            with self._sessions.session() as connection:
                left = QueueStore(connection, self._tables).left(queues)
            yield left

    def forget(self, queues: Sequence[str]) -> None:
        """As Registry says."""
        with self._sessions.session() as connection:
            QueueStore(connection, self._tables).forget(queues)


def restore_former_life(
    registry: Registry,
    broker: Broker,
    node: str,
    *,
    wait: Callable[[Callable[[], bool], float], object],
    closing: Callable[[], bool],
    now: Callable[[], float] = clock.now,
) -> int:
    """Restore what an earlier life of this node had taken, before it consumes; returns how many
    messages. Waits for others who are at it.

    Args:
        registry: Who sweeps what.
        broker: The broker.
        node: The node's name.
        wait: Waits until a condition holds, for so many seconds at most.
        closing: Whether the worker is told to stop.
        now: The clock.

    Raises:
        JobSyncError: The database cannot be reached, or somebody else was at it for a minute.
    """
    give_up = now() + _FORMER_SEC
    while True:
        with registry.held(node) as held:
            if held:
                return broker.restore(node)
        if closing():
            return 0
        if now() >= give_up:
            raise JobSyncError(
                f'another node has been putting back what an earlier life of {node!r} left '
                f'for more than {_FORMER_SEC:.0f} s: '
                'see whether its connection to the broker is stuck, and end it'
            )
        wait(closing, _TRY_AGAIN_SEC)
