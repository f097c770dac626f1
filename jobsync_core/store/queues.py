"""Who owns what, for routers; and the queues that belong to nodes.

AMQP cannot list queues, so the table `node_queue` remembers which there are: one for each node and
home queue. A row whose node is not in the node table is an orphan: its messages are for whoever
owns them now. The table `queue` holds those of earlier versions, which had one for each node.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..assignment.groups import PLAIN
from ..belonging import Belonging, Peer
from .base import Store

__all__ = ['Division', 'Orphan', 'Owners', 'QueueStore']

#: Seconds for which whoever holds what a node left may be silent, while the broker works.
_HOLD_SEC = 600


@dataclass(frozen=True)
class Orphan:
    """A queue of a node that is gone, and for how many seconds that has been known.

    home: The home queue that it is for; '' for one of an earlier version, which was for all.
    """

    queue: str
    node: str
    age: float
    home: str = ''


@dataclass(frozen=True)
class Division:
    """One of several queue groups that nodes give a home queue, and these nodes. Their settings
    differ: a key has an owner in each of the groups.
    """

    home: str
    group: str
    nodes: Sequence[str]


@dataclass(frozen=True)
class Owners:
    """Who owns what.

    Attributes:
        version, total_tokens, hash_function: Those of the cluster.
        groups: Queue groups that have a node or tokens, by name: their ids. '' is among them.
        deserted: Those that no node names any more.
        rows: First token, end, owner and whether it is blocked, by token on the number line of all
            groups. Tokens that move belong to their receiver. The owner is None where nobody has
            one yet, or, where it is blocked, none of the live nodes may.
        queues: By node and home queue, of nodes in the node table; the home queue of one of an
            earlier version is ''.
    """

    version: int
    total_tokens: int
    hash_function: str
    groups: Mapping[str, int]
    deserted: frozenset[str]
    rows: tuple[tuple[int, int, str | None, bool], ...]
    queues: Mapping[tuple[str, str], str]


class QueueStore(Store):
    """Queues, their nodes, and who owns which tokens."""

    def identify(self, node: str, belonging: Belonging) -> bool:
        """Note what `node` belongs to, before it has a queue; True where that was not known."""
        row = self._row('queue.identify', {'node': node, **dataclasses.asdict(belonging)})
        return row is not None and bool(row[0])

    def record(
        self, name: str, node: str, home: str, belonging: Belonging, group: str = ''
    ) -> bool:
        """Note that `node` has a queue of that name for a home queue, '' where it is for all, what
        it belongs to, and which queue group the home queue has by its settings; True where the
        queue was not known before.
        """
        row = self._row(
            'queue.record' if home else 'queue.record_for_all',
            {
                'name': name,
                'node': node,
                'home': home,
                'group': group,
                **dataclasses.asdict(belonging),
            },
        )
        return row is not None and bool(row[0])

    def tell_silent(self, node: str, incarnation: str, silent: bool) -> None:
        """Note whether this life of `node` does not reach its broker."""
        self._run('queue.tell_silent', {'node': node, 'incarnation': incarnation, 'silent': silent})

    def divided(self) -> list[Division]:
        """Home queues that nodes in the node table give different queue groups, by name."""
        return [Division(*row) for row in self._rows('queue.divided')]

    def retire(self, node: str, keep: Collection[str]) -> None:
        """Note that a node, which lives, has these queues and none besides: its others count as
        those of nodes that are gone, until it records them again.
        """
        self._run('queue.retire', {'node': node, 'keep': list(keep)})

    def left(self, names: Collection[str]) -> frozenset[str]:
        """Those of these queues whose node is gone, or lives and has left them alone."""
        return frozenset(row[0] for row in self._rows('queue.left', {'names': list(names)}))

    def withdraw(self, node: str) -> None:
        """Take back what `identify` noted, for a node that may not join: it made no queue."""
        self._run('queue.withdraw', {'node': node})

    def withdraw_queue(self, name: str, node: str) -> None:
        """Take back what `record` noted: the node's queue is gone."""
        self._run('queue.withdraw_queue', {'name': name, 'node': node})

    def peers(self, node: str, timeout: float) -> list[Peer]:
        """The other nodes that seem to live, oldest first, and what they belong to.

        By the server's clock, as nothing depends on it but whether a node that was just started is
        told of a mistake.

        Args:
            node: The node that asks.
            timeout: Seconds without a heartbeat after which a node does not count.
        """
        rows = self._rows('queue.peers', {'node': node, 'timeout': timeout})
        return [Peer(row[0], Belonging(*row[1:])) for row in rows]

    def orphans(self, kind: str, young: float) -> list[Orphan]:
        """Queues of nodes that are gone, the newest first: those of which it has been known for
        less than `young` seconds.

        Which these are is written down here.
        """
        found = self._rows('queue.orphans', {'kind': kind, 'young': young})
        fresh = [name for name, _, age, _ in found if age is None]
        if fresh:
            self._run('queue.note_orphans', {'names': fresh})
        return [Orphan(queue, node, age or 0.0, home) for queue, node, age, home in found]

    def old_orphans(self, kind: str, young: float) -> list[Orphan]:
        """Queues of nodes that have been gone for longer, the newest first."""
        return [
            Orphan(*row) for row in self._rows('queue.old_orphans', {'kind': kind, 'young': young})
        ]

    def known(self, kind: str) -> list[tuple[str, str, str]]:
        """All queues that a plugin's nodes have, or had when they were seen last: each with its
        node and its home queue.
        """
        return [(row[0], row[1], row[2]) for row in self._rows('queue.known', {'kind': kind})]

    def heartbeats(self) -> dict[str, tuple[Any, ...]]:
        """A sign of life of each node in the node table; another one after each heartbeat."""
        return {row[0]: tuple(row[1:]) for row in self._rows('queue.heartbeats')}

    def draining(self, kind: str, me: str) -> list[Orphan]:
        """Queues of other nodes that live, drain, and have given all of their tokens away: what is
        in there is for others by now.
        """
        rows = self._rows('queue.draining', {'kind': kind, 'me': me})
        return [Orphan(queue, node, 0.0, home) for queue, node, home in rows]

    def hold(self, node: str) -> bool:
        """Hold what a node left behind: nobody else sweeps it meanwhile, and a new life of the node
        does not begin to consume.

        The transaction holds it, so that it goes with its end, with the process, and with no other
        client of a pooler. A process that is stopped loses it after ten minutes. The transaction
        stays idle while the broker works; it holds back no VACUUM, having no snapshot then.

        Args:
            node: The node's name; '' for the parked messages.

        Returns:
            Whether it is held; nobody waits for another holder here.
        """
        ((_, held),) = self._rows(
            'queue.hold',
            {'silent': f'{_HOLD_SEC}s', 'what': f'jobsync {self._tables.label} {node}'},
        )
        return bool(held)

    def hold_all(self, nodes: Collection[str]) -> frozenset[str]:
        """As `hold`, for several nodes; those that are held now."""
        rows = self._rows(
            'queue.hold_all',
            {
                'silent': f'{_HOLD_SEC}s',
                'what': f'jobsync {self._tables.label} ',
                'nodes': sorted(nodes),
            },
        )
        return frozenset(node for node, _, held in rows if held)

    def is_gone(self, node: str) -> bool:
        """Whether the node is not in the node table."""
        ((gone,),) = self._rows('queue.is_gone', {'node': node})
        return bool(gone)

    def forget(self, names: Sequence[str]) -> None:
        """These queues are gone, and so are their nodes."""
        self._run('queue.forget', {'names': list(names)})

    def owners(self, known: int) -> Owners | None:
        """Who owns which tokens, or is about to; None where the version is still `known`."""
        row = self._row('queue.owners', {'known': known})
        if row is None:
            return None
        version, total, function, groups, queues, rows = row
        named = json.loads(groups or '[]')
        return Owners(
            version,
            total,
            function,
            {'': PLAIN, **{name: number for name, number, _ in named}},
            frozenset(name for name, _, is_named in named if not is_named),
            tuple((lo, hi, node, blocked) for lo, hi, node, blocked in json.loads(rows or '[]')),
            {(node, home): name for node, home, name in json.loads(queues or '[]')},
        )
