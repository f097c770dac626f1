"""Virtual time: nodes with clocks of their own, a network that delays and loses, and one store.

The world stands in for the agent and for PostgreSQL. It drives the very Protocol that the agent
drives, one request at a time, with the same rules: notifications are handed over between requests,
a request that is not answered in time fails and its connection is closed, while the statement
itself may be carried out all the same, even later.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from jobsync_core.assignment.groups import GROUP_SPAN, group_of
from jobsync_core.assignment.model import Member, Segment
from jobsync_core.assignment.round import Decision, Pin
from jobsync_core.errors import ClusterNotFormed, DuplicateNodeName
from jobsync_core.process import Process
from jobsync_core.protocol.messages import Reply, Request
from jobsync_core.protocol.messages.connection import Connect, ConnectReply
from jobsync_core.protocol.messages.groups import Enroll
from jobsync_core.protocol.messages.handover import Give, Refresh
from jobsync_core.protocol.messages.leadership import Lead
from jobsync_core.protocol.messages.membership import Beat

from .invariants import Violation, check_one_claimer, check_plan, unsettled
from .masks import mask_of, renamed, tokens_in
from .node import LEASE_FRACTION, MappedOwnership, SimNode, SimOwnership
from .store import SimStore

__all__ = ['Network', 'World']


class Network:
    """Chances and delays of one run. Times in seconds of true time."""

    def __init__(self) -> None:
        self.delay = 0.002
        self.slow = 0.0  # chance that one way takes a good part of the time-out
        self.lost_reply = 0.0
        self.late = 0.0  # chance that a statement is carried out after its sender has given up
        self.lateness = 6.0  # by how much at most
        self.late_gives = self.late_leads = 0.0  # the same, for these statements
        self.late_enrolls = 0.0  # at least this, for those
        self.lost_notification = 0.0


class World:
    """Everything at once. Deterministic: the same seed and the same calls give the same run."""

    def __init__(
        self, seed: int, total_tokens: int, *, tracing: int = 0, real_ownership: bool = False
    ) -> None:
        self.rng = random.Random(seed)
        self.now = 0.0
        self.store = SimStore(total_tokens, on_plan=self._planned)
        self.network = Network()
        self.nodes: list[SimNode] = []
        self.holders: list[SimNode] = []
        self.up = True
        self.frozen = False
        self.database_offset = 1_000_000.0
        # which server, in true time, answers; the name of its history may be another one's too
        self.origin = 0
        self.origins = [-math.inf]  # when each began to serve
        self.refused: dict[
            str | None, tuple[type, ...]
        ] = {}  # what the server cannot do for whom; None: for all
        self.longest_timeout = 0.0
        self.owner_checked = True
        self.leases_checked = True
        self.tasks_checked = True
        self.restart_delay: tuple[float, float] | None = None
        self.history: deque[str] = deque(maxlen=tracing or 1)
        self.steps = 0
        self.audited: set[str] = set()
        self.spawn: Callable[[SimNode], None] | None = None
        self._tracing = bool(tracing)
        self._real_ownership = real_ownership
        self._heap: list[tuple[float, int, Callable[..., object], tuple[Any, ...]]] = []
        self._order = 0
        self._numbers = 0
        self._connections: dict[int, SimNode] = {}
        self._connection_of_request: dict[tuple[int, int], int] = {}
        self._next_connection = 0
        self._waiting: list[
            tuple[SimNode, Request, int, float, int | None]
        ] = []  # statements that reached a frozen server
        self._gone: set[int] = set()
        self.slots = {'': 0}
        self._last_end: dict[str, float] = {}
        self._answers: dict[str, tuple[SimNode, str]] = {}
        self._owned: dict[str, int] = {}
        self._owned_at = -1

    def at(self, time: float, action: Callable[..., object], *args: Any) -> None:
        """Run `action(*args)` at a true time."""
        self._order += 1
        heapq.heappush(self._heap, (time, self._order, action, args))

    def run(self, until: float) -> None:
        """Let time pass, and check I1 and I2 after each step."""
        heap = self._heap
        while heap and heap[0][0] <= until:
            time, _, action, args = heapq.heappop(heap)
            self.now = time
            action(*args)
            self.steps += 1
            check_one_claimer(self)
        self.now = until

    def slot(self, group: str) -> int:
        """The place of a queue group in masks that are compared, whatever its id."""
        return self.slots.setdefault(group, len(self.slots))

    def named(self, node: SimNode, mask: int) -> int:
        """A mask of one node with the groups by their names, as this node knows them."""
        return renamed(mask, node.protocol.groups, self.slots)

    def tokens_in(self, named: int) -> list[str]:
        """The tokens of such a mask, for messages."""
        names = {slot: group for group, slot in self.slots.items()}
        return [
            f'{names.get(group_of(token), "unknown")}:{token % GROUP_SPAN}'
            for token in tokens_in(named)
        ]

    def trace(self, node: SimNode | None, what: str, *details: object) -> None:
        """Remember an event for the report of a failure. Its details become text only then."""
        if self._tracing:
            own = f'{node.local():10.3f} {node!s:8}' if node is not None else ' ' * 19
            text = ' '.join(map(str, details))
            self.history.append(f'{self.now:10.4f} {own} {what:12} {text}')

    def next_number(self) -> int:
        self._numbers += 1
        return self._numbers

    def new_ownership(self, total_tokens: int) -> SimOwnership | MappedOwnership:
        return MappedOwnership(total_tokens) if self._real_ownership else SimOwnership(total_tokens)

    def add(self, node: SimNode) -> SimNode:
        """Start a process."""
        self.nodes.append(node)
        self.holders.append(node)
        self.longest_timeout = max(self.longest_timeout, node.settings.timeout)
        self.store.timeout = self.longest_timeout
        self.trace(node, 'starts', '')
        self.at(self.now, node.step)
        return node

    def live(self) -> list[SimNode]:
        """The processes that run."""
        return [node for node in self.nodes if node.running]

    def is_gone(self, process: Process) -> bool:
        return process.pid in self._gone

    def ended(self, node: SimNode) -> None:
        """A process ended by itself; its supervisor starts it again unless it left or may not
        be.
        """
        self._remove(node)
        if isinstance(node.error, ClusterNotFormed):
            raise Violation(f'{node} failed: {node.error}')
        if isinstance(node.error, DuplicateNodeName):
            # After a failover a dead process's row may show another number, as if it lived.
            ended = max(self._last_end.get(node.name, 0.0), self.origins[-1])
            recently = self.now - ended <= node.settings.timeout + self.network.lateness
            if not recently and not any(other.name == node.name for other in self.nodes):
                raise Violation(f'{node} failed although nobody else has its name: {node.error}')
            return
        self._last_end[node.name] = self.now
        if node.wanted and self.spawn is not None:
            self.at(self.now + 0.1 + self.rng.random(), self.spawn, node)

    def crashed(self, node: SimNode) -> None:
        self._last_end[node.name] = self.now
        self._remove(node)

    def _remove(self, node: SimNode) -> None:
        self._gone.add(node.number)
        self.nodes.remove(node)
        self.holders.remove(node)

    def owned(self, name: str) -> int:
        if self._owned_at != self.store.changes:
            self._owned, self._owned_at = {}, self.store.changes
        mask = self._owned.get(name)
        if mask is None:
            mask = self._owned[name] = self.store.owned_mask(name)
        return mask

    def _one_way(self) -> float:
        delay = self.rng.random() * 2 * self.network.delay
        if self.network.slow and self.rng.random() < self.network.slow:
            delay += self.rng.random()
        return delay

    def transmit(self, node: SimNode, request: Request, request_id: int, deadline: float) -> None:
        """Send a request. It is carried out once, perhaps late, or never."""
        rng, network = self.rng, self.network
        if node.cut_up:
            if rng.random() < 0.5:
                # What the kernel goes on sending reaches the server when the link is whole again.
                self.at(
                    deadline + rng.random() * network.lateness,
                    self._execute_late,
                    node,
                    request,
                    node.connection,
                )
            self.at(deadline, node.fail, request_id)
            return
        late = (
            network.late_gives
            if isinstance(request, Give)
            else network.late_leads
            if isinstance(request, Lead)
            else max(network.late, network.late_enrolls)
            if isinstance(request, Enroll)
            else network.late
        )
        if late and rng.random() < late:
            self.at(
                deadline + rng.random() * network.lateness,
                self._execute_late,
                node,
                request,
                node.connection,
            )
            self.at(deadline, node.fail, request_id)
            return
        self.at(
            self.now + self._one_way(),
            self.execute,
            node,
            request,
            request_id,
            deadline,
            node.connection,
        )

    def _execute_late(self, node: SimNode, request: Request, connection: int | None) -> None:
        if not node.cut_up and self.up and not self.frozen and connection in self._connections:
            self._answer(node, request)

    def execute(
        self,
        node: SimNode,
        request: Request,
        request_id: int,
        deadline: float,
        connection: int | None,
    ) -> None:
        """The request reaches the server."""
        if not self.up or (
            connection not in self._connections and not isinstance(request, Connect)
        ):
            self._refuse(node, request_id, deadline)
            return
        if self.frozen:
            self._waiting.append((node, request, request_id, deadline, connection))
            self.at(max(deadline, self.now), node.fail, request_id)
            return
        if isinstance(request, Connect):
            reply: Reply = ConnectReply(
                '' if self.store.tells_history else f'address-{self.origin}'
            )
            self._next_connection += 1
            self._connections[self._next_connection] = node
            self._connection_of_request[node.number, request_id] = self._next_connection
            node.deaf = False
        elif isinstance(request, (*self.refused.get(None, ()), *self.refused.get(node.name, ()))):
            self.trace(node, 'refused', request)
            self.at(self.now + self.rng.random() * node.op_timeout, node.refuse, request_id)
            return
        else:
            reply = self._answer(node, request)
        lost = node.cut_down or (
            self.network.lost_reply and self.rng.random() < self.network.lost_reply
        )
        arrival = self.now + self._one_way()
        if lost or arrival >= deadline:
            self.at(max(deadline, self.now), node.fail, request_id)
        else:
            self.at(arrival, self._arrive, node, request_id, reply, self.origin, deadline)

    def _arrive(
        self, node: SimNode, request_id: int, reply: Reply, origin: int, deadline: float
    ) -> None:
        if node.cut_down:
            self.at(max(deadline, self.now), node.fail, request_id)
        else:
            node.receive(request_id, reply, origin)

    def _refuse(self, node: SimNode, request_id: int, deadline: float) -> None:
        at_once = not node.cut_down and not node.cut_up
        self.at(
            self.now + self._one_way() if at_once else max(deadline, self.now),
            node.fail,
            request_id,
        )

    def _answer(self, node: SimNode, request: Request) -> Reply:
        store = self.store
        store.clock = self.now + self.database_offset
        store.asker_clock, store.asker_is_old = node.local(), node.is_old
        had = self.owned(node.name)
        reply = store.handle(request)
        store.asker_is_old = False
        if isinstance(request, Give):
            more = had & ~self.owned(node.name) & ~mask_of(request.ranges)
            if more:
                raise Violation(f'hand-over: {tokens_in(more)} go as well with {request} of {node}')
        if (
            isinstance(request, (Beat, Refresh))
            and reply is not None
            and store.nodes[request.name].incarnation != request.incarnation
        ):
            raise Violation(
                f'lives: {request} of {node} is answered for another life: '
                f'{store.nodes[request.name].sign}'
            )
        self.trace(node, 'executed', type(request).__name__, '->', reply)
        self.deliver_notifications()
        return reply

    def deliver_notifications(self) -> None:
        """Send what the store has to tell to everybody who listens."""
        store = self.store
        if not store.outbox:
            return
        for payload in store.outbox:
            for connection, node in self._connections.items():
                if node.connection != connection or node.cut_down or node.deaf:
                    continue
                if (
                    self.network.lost_notification
                    and self.rng.random() < self.network.lost_notification
                ):
                    continue
                self.at(self.now + self._one_way(), node.notify, payload)
        store.outbox.clear()

    def connection_of(self, node: SimNode, request_id: int) -> int | None:
        connection = self._connection_of_request.pop((node.number, request_id), None)
        return connection if connection in self._connections else None

    def has_connection(self, connection: int) -> bool:
        return connection in self._connections

    def stop_server(self) -> None:
        """Immediate shutdown: what was under way is lost, everybody is disconnected."""
        self.trace(None, 'server stops', '')
        self.up = False
        self.frozen = False
        self._waiting.clear()
        connections, self._connections = self._connections, {}
        for connection, node in connections.items():
            if node.connection == connection and not node.cut_down and not node.cut_up:
                self.at(self.now + self._one_way(), node.disconnect)

    def start_server(self) -> None:
        self.trace(None, 'server starts', '')
        self.up = True

    def freeze_server(self) -> None:
        """The server hangs: it accepts and does nothing."""
        if self.up:
            self.trace(None, 'server hangs', '')
            self.frozen = True

    def thaw_server(self) -> None:
        """The server goes on, with everything that was sent meanwhile, whether its sender still
        waits or not.
        """
        if not self.frozen:
            return
        self.trace(None, 'server resumes', '')
        self.frozen = False
        waiting, self._waiting = self._waiting, []
        for node, request, request_id, deadline, connection in waiting:
            self.at(
                self.now + self._one_way(),
                self.execute,
                node,
                request,
                request_id,
                deadline,
                connection,
            )

    def fail_over(self, standby: SimStore) -> None:
        """A standby that lacks the last writes becomes the server; the old one is fenced off, and
        with it all connections.
        """
        self.stop_server()
        self.promote(standby)

    def promote(self, standby: SimStore) -> None:
        """A standby that lacks the last writes becomes the server, and a pooler has the same
        connections lead there.

        The new timeline's number is that of the standby, plus one: of standbys that have not
        followed each other's promotion, two give their histories the same name.
        """
        self._serve(standby, standby.server + "'")

    def fail_back(self, old: SimStore) -> None:
        """The primary of before, which knows nothing of what came after it, is put back in its
        place; no connection is lost.
        """
        self._serve(old, old.server)

    def _serve(self, store: SimStore, history: str) -> None:
        store = store.snapshot()
        store.server = history
        self.origin += 1
        self.origins.append(self.now)
        self._replace(store)
        self.trace(None, 'failover', f'version {store.version}, {history}')

    def may_hold_foreign_leases(self, origin: int) -> float:
        """Until when, in true time, a lease from before this server may be valid somewhere."""
        return self.origins[origin] + LEASE_FRACTION / 0.99 * self.longest_timeout

    def restore(self, backup: SimStore) -> None:
        """The same server comes back with the tables of a backup."""
        self.stop_server()
        self._replace(backup.snapshot())
        self.start_server()

    def _replace(self, store: SimStore) -> None:
        changes = self.store.changes
        self.store = store
        store.on_plan = self._planned
        store.changes = changes + 1

    def _planned(
        self,
        members: Sequence[Member],
        before: Sequence[Segment],
        pins: Sequence[Pin],
        decision: Decision,
    ) -> None:
        check_plan(members, before, pins, decision, self.store.total_tokens)

    def answered(self, node: SimNode, task: str) -> None:
        """The user's code on `node` was told that it may take the task."""
        self.trace(node, 'may take', task)
        if not self.tasks_checked:
            return
        earlier = self._answers.get(task)
        if earlier is not None and earlier[0] is not node:
            other, incarnation = earlier
            row = self.store.nodes.get(other.name)
            open_promise = task in other.promised or task in other.taken
            if (
                other.running
                and open_promise
                and row is not None
                and row.incarnation == incarnation == other.protocol.incarnation
            ):
                raise Violation(
                    f'tasks: {node} may take {task}, which the live {other} was told that it may '
                    'take'
                )
        if task in self.audited:
            raise Violation(f'tasks: {node} may take {task}, which is audited')
        self._answers[task] = (node, node.protocol.incarnation)

    def accepted(self, node: SimNode, task: str) -> None:
        """A claim was recorded; the store has ruled out that two live nodes hold one."""
        self.trace(node, 'took', task)

    def whole(self) -> str | None:
        """Why the cluster is not whole; None if it is."""
        return unsettled(self)
