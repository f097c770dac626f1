"""Virtual time: nodes with clocks of their own, a network that delays and loses, and one store.

The world stands in for the agent. It drives the very Protocol that the agent drives, one request at a time, with the
same rules: notifications are handed over between requests, a request that is not answered in time fails and its
connection is closed, while the statement itself may be carried out all the same, even later.
"""
from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Callable
from typing import Any

from jobsync_core.claims import Claims
from jobsync_core.errors import ClusterNotFormed, DuplicateNodeName
from jobsync_core.messages import Beat, Beaten, Connect, Connected, Give, Lead, Leave, Process, Refresh, Reply, Request
from jobsync_core.protocol import Entered, Failed, Left, Phase, Protocol, RebalanceEvent, Release, Settings
from jobsync_core.tokens import TokenSet

from .invariants import Violation, check_one_claimer, check_plan, unsettled
from .store import SimStore, mask_of, task_key, token_of

__all__ = ['Network', 'SimClaims', 'SimNode', 'World']

#: Requests that one node may send within one poll interval; more is a busy loop.
_MOST_REQUESTS = 40
LEASE_FRACTION = 0.9
TASKS_PER_TOKEN = 2


class SimClaims(Claims):
    """Claims without shared memory; `mask` is the token set as bits."""

    def __init__(self, total_tokens: int) -> None:
        self.total_tokens = total_tokens
        self.lease = [0.0]  # type: ignore[assignment]  # a list is as good as a view of doubles
        self._tokens = TokenSet()
        self.excluded = frozenset()
        self.mask = 0

    @property
    def tokens(self) -> TokenSet:
        return self._tokens

    def may_claim(self, token: int, now: float) -> bool:
        return now < self.lease[0] and bool(self.mask >> token & 1)

    def replace(self, tokens: TokenSet) -> None:
        self._tokens = tokens
        self.mask = mask_of(tokens.ranges)

    def answers(self, now: float) -> int:
        """The tokens for which `may_claim` says True, as bits."""
        return self.mask if now < self.lease[0] else 0


class Network:
    """Chances and delays of one run. Times in seconds of true time."""

    def __init__(self) -> None:
        self.delay = 0.002
        self.slow = 0.0  # chance that one way takes a good part of the time-out
        self.lost_reply = 0.0
        self.late = 0.0  # chance that a statement is carried out after its sender has given up
        self.lateness = 6.0  # by how much at most
        self.late_gives = self.late_leads = 0.0  # the same, for these statements
        self.lost_notification = 0.0


class SimNode:
    """One process: a protocol, its claims, its clock, and what its user's code has been told."""

    def __init__(
        self, world: World, name: str, settings: Settings, *, rate: float, offset: float, machine: int, release_times: Callable[[], float],
    ) -> None:
        self.world = world
        self.name = name
        self.settings = settings
        self.rate = rate
        self.offset = offset
        self.number = world.next_number()
        self.machine = machine
        self._lives = 0
        self.claims = world.new_claims(settings.total_tokens)
        self.process = Process(f'host{machine}', f'boot{machine}', 'ns', self.number, '')
        self.protocol = Protocol(
            name, settings, self.process, self.claims, new_incarnation=self._new_incarnation,
            is_known_dead=self._is_known_dead, promises=self._promises)
        self.running = True
        self.paused = False
        self.error: Exception | None = None
        self.wanted = True  # a supervisor starts it again when it ends by itself
        self.cut_up = self.cut_down = False
        self.deaf = False
        self.entered = False
        self.lease_bound = 0.0
        self.announced = 0
        self.events = 0
        self.connection: int | None = None
        self.promised: dict[str, int] = {}
        self.taken: set[str] = set()
        self.done: set[str] = set()
        self._request: Request | None = None
        self._request_id = 0
        self._sent_local = 0.0
        self._deadline = 0.0
        self._wake_id = 0
        self._mail: list[tuple[int, Reply]] = []
        self._inbox: deque[str] = deque()
        self._release_times = release_times
        self._releases: dict[int, tuple[int, float]] = {}
        self._release_free_at = 0.0
        self._recent: deque[float] = deque(maxlen=_MOST_REQUESTS)
        self._failing_since: float | None = None
        self.op_timeout = max(0.5, min(settings.interval, settings.timeout / 5))
        self.connect_timeout = self.op_timeout

    def __str__(self) -> str:
        return f'{self.name}#{self.number}'

    def local(self) -> float:
        """The node's own clock."""
        return self.offset + self.rate * self.world.now

    def true_time(self, local: float) -> float:
        """When the node's clock shows `local`."""
        return (local - self.offset) / self.rate

    def _new_incarnation(self) -> str:
        self._lives += 1
        return f'{self.name}#{self.number}.{self._lives}'

    def _is_known_dead(self, process: Process) -> bool:
        return process.host == self.process.host and self.world.is_gone(process)

    # --- the agent's loop ---

    def step(self) -> None:
        """What the agent does when it wakes: ask the protocol, send or wait."""
        if not self.running or self.paused or self._request is not None:
            return
        protocol = self.protocol
        while self._inbox:
            protocol.notified(self._inbox.popleft(), self.local())
        now = self.local()
        request = protocol.next(now)
        self._run_effects()
        if protocol.phase in (Phase.LEFT, Phase.FAILED):
            self._end()
        elif request is None:
            self._sleep(now)
        else:
            self._send(request, now)

    def _sleep(self, now: float) -> None:
        wake = self.protocol.wake_at
        if wake <= now:
            raise Violation(f'no-spin: {self} has nothing to send at {now:.6f} but wants to wake at {wake:.6f}')
        self._wake_id += 1
        if wake < float('inf'):
            self.world.at(max(self.true_time(wake), self.world.now) + 1e-6, self._wake, self._wake_id)

    def _wake(self, wake_id: int) -> None:
        if wake_id == self._wake_id:
            self.step()

    def _send(self, request: Request, now: float) -> None:
        recent = self._recent
        if len(recent) == _MOST_REQUESTS and now - recent[0] < self.settings.poll:
            raise Violation(f'no-spin: {self} sent {_MOST_REQUESTS} requests within {now - recent[0]:.3f} s, last {request}')
        recent.append(now)
        if isinstance(request, (Give, Leave)):
            self._check_release_order(request, now)
        self._wake_id += 1
        self._request = request
        self._request_id += 1
        self._sent_local = now
        self._deadline = now + (self.connect_timeout if isinstance(request, Connect) else self.op_timeout)
        world = self.world
        world.trace(self, 'sends', request)
        if isinstance(request, Connect):
            self.connection = None
        world.transmit(self, request, self._request_id, self.true_time(self._deadline))

    def _check_release_order(self, request: Give | Leave, now: float) -> None:
        leaving = mask_of(request.ranges) if isinstance(request, Give) else -1
        for mask, deadline in self._releases.values():
            if mask & leaving and now < deadline - 1e-6:
                raise Violation(f'on_release: {self} gives tokens away by {request} while on_release runs for them')

    def receive(self, request_id: int, reply: Reply) -> None:
        """The reply has arrived at the process's socket."""
        if not self.running or request_id != self._request_id or self._request is None:
            return
        if self.paused:
            self._mail.append((request_id, reply))
            return
        request, self._request = self._request, None
        if isinstance(reply, Connected):
            self.connection = self.world.connection_of(self, request_id)
            if self.connection is None:
                self._failed(request)
                return
        if isinstance(reply, Beaten):
            self.lease_bound = max(self.lease_bound, self._sent_local + LEASE_FRACTION * self.settings.timeout)
        self._failing_since = None
        self.world.trace(self, 'hears', reply)
        self.protocol.reply(request, reply, self.local())
        self._run_effects()
        self.step()

    def fail(self, request_id: int) -> None:
        """The request's time is up, or its connection broke."""
        if not self.running or self.paused or request_id != self._request_id or self._request is None:
            return
        request, self._request = self._request, None
        self._failed(request)

    def _failed(self, request: Request) -> None:
        now = self.local()
        self.connection = None
        self.world.trace(self, 'fails', request)
        self.protocol.failed(request, now)
        self._failing_since = self._failing_since if self._failing_since is not None else now
        self._run_effects()
        protocol = self.protocol
        if protocol.phase is Phase.LEAVING:
            self._end()
        elif not protocol.entered and (
                isinstance(request, Connect) if protocol.phase is Phase.JOINING else now - self._failing_since > self.settings.timeout):
            self._end()
        else:
            self.step()

    def disconnect(self) -> None:
        """The server has closed the connection and the process has noticed."""
        if not self.running or self.paused:
            return
        if self._request is not None:
            self.fail(self._request_id)
        elif self.connection is not None:
            self.connection = None
            self.world.trace(self, 'disconnected', '')
            self.protocol.disconnected(self.local())
            self._run_effects()
            self.step()

    def notify(self, payload: str) -> None:
        """A notification has arrived at the socket."""
        if self.running:
            self._inbox.append(payload)
            self.step()

    def _end(self) -> None:
        """The agent's thread has ended and the process with it."""
        self.claims.suspend()
        self.running = False
        self.world.trace(self, 'ends', self.error or self.protocol.phase)
        self.world.ended(self)

    # --- pauses ---

    def pause(self) -> None:
        """SIGSTOP."""
        if self.running:
            self.paused = True
            self.world.trace(self, 'paused', '')

    def resume(self) -> None:
        """SIGCONT. The user's code may run first; then the agent finds a reply, a time-out, or both."""
        if not self.running or not self.paused:
            return
        self.paused = False
        self.world.trace(self, 'resumed', '')
        if self.world.rng.random() < 0.5:
            self.use()
        mail, self._mail = self._mail, []
        if self._request is None:
            broken = self.connection is not None and not self.world.has_connection(self.connection)
            self.disconnect() if broken and self.world.rng.random() < 0.5 else self.step()
            return
        late = self.local() >= self._deadline
        if mail and not (late and self.world.rng.random() < 0.5):
            self.receive(*mail[-1])
        elif late or self.connection is not None and not self.world.has_connection(self.connection):
            self.fail(self._request_id)
        else:
            self.world.at(self.true_time(self._deadline), self.fail, self._request_id)

    # --- effects ---

    def _run_effects(self) -> None:
        for effect in self.protocol.take_effects():
            self.world.trace(self, 'effect', effect)
            if isinstance(effect, RebalanceEvent):
                self._rebalanced(effect)
            elif isinstance(effect, Release):
                self._release(effect)
            elif isinstance(effect, Entered):
                self.entered = True
            elif isinstance(effect, Failed):
                self.error = effect.error
            elif isinstance(effect, Left):
                self.wanted = False

    def _rebalanced(self, event: RebalanceEvent) -> None:
        self.announced += event.tokens_added - event.tokens_removed
        self.events += 1
        if event.is_initial != (self.events == 1) and self.entered:
            raise Violation(f'events: {self} got is_initial={event.is_initial} as event number {self.events}')
        if self.announced < 0:
            raise Violation(f'events: {self} was told of {-self.announced} more removed tokens than added ones')

    def _release(self, effect: Release) -> None:
        now = self.local()
        self._releases[effect.number] = (mask_of(effect.tokens.ranges), now + self.settings.release_timeout)
        start = max(self.world.now, self._release_free_at)
        self._release_free_at = start + self._release_times()
        self.world.at(self._release_free_at, self._released, effect.number)

    def _released(self, number: int) -> None:
        if not self.running:
            return
        if self.paused:
            self.world.at(self.world.now + 0.1, self._released, number)
            return
        self._releases.pop(number, None)
        self.world.trace(self, 'released', number)
        self.protocol.released(number, self.local())
        self.step()

    # --- the user's code ---

    def _promises(self, tokens: TokenSet) -> tuple[tuple[str, int], ...]:
        return tuple((task, token) for task, token in self.promised.items() if token in tokens)

    def can_claim(self, task: str) -> bool:
        """What TaskBook.can_claim answers, the confirming look at the database included."""
        if not self.claims.may_claim(token_of(task), self.local()):
            return False
        if task in self.taken or task in self.done:
            return False
        if task_key(task) in self.claims.excluded and (not self._reaches_store() or self.world.store.is_taken(self.name, task)):
            return False
        self.promised[task] = token_of(task)
        return True

    def _reaches_store(self) -> bool:
        return self.world.up and not self.world.frozen and not self.cut_up and not self.cut_down

    def use(self) -> None:
        """The guide's loop: ask for a task, later record it, later audit it."""
        if not self.running or self.paused:
            return
        rng = self.world.rng
        task = f'{rng.randrange(self.settings.total_tokens)}.{rng.randrange(TASKS_PER_TOKEN)}'
        if self.can_claim(task):
            self.world.answered(self, task)
            self.world.at(self.world.now + rng.random() * self.settings.timeout, self._record, task)

    def _record(self, task: str) -> None:
        if not self.running or self.paused or task not in self.promised:
            return
        if not self._reaches_store():
            return
        if self.world.store.claim(self.name, self.protocol.incarnation, task):
            self.world.accepted(self, task)
            self.taken.add(task)
        del self.promised[task]

    def write_audit(self) -> None:
        """`write_audit()`."""
        if self.running and not self.paused and self._reaches_store():
            store = self.world.store
            mine = {task for task in self.taken if store.live_claim(task) == (self.name, self.protocol.incarnation)}
            store.audit(self.name, mine)
            self.world.audited |= mine
            self.world.trace(self, 'audits', mine)
            self.done |= mine
            self.taken -= mine

    # --- commands ---

    def leave(self) -> None:
        """A graceful exit."""
        if not self.running:
            return
        if self.paused:
            self.world.at(self.world.now + 0.2, self.leave)
            return
        self.wanted = False
        self.write_audit()
        self.protocol.leave(self.local())
        self._run_effects()
        if self.protocol.phase in (Phase.LEFT, Phase.FAILED):
            self._end()
        else:
            self.step()

    def drain(self, draining: bool) -> None:
        """`job.drain()` or `job.undrain()`."""
        if self.running and not self.paused:
            self.protocol.drain(self.local()) if draining else self.protocol.undrain(self.local())
            self.step()

    def crash(self) -> None:
        """SIGKILL."""
        if self.running:
            self.running = False
            self.claims.suspend()
            self.world.trace(self, 'crashed', '')
            self.world.crashed(self)


class World:
    """Everything at once. Deterministic: the same seed and the same calls give the same run."""

    def __init__(self, seed: int, total_tokens: int, *, tracing: int = 0, real_claims: bool = False) -> None:
        self.rng = random.Random(seed)
        self.now = 0.0
        self.store = SimStore(total_tokens, on_plan=self._planned)
        self.network = Network()
        self.nodes: list[SimNode] = []
        self.holders: list[SimNode] = []
        self.up = True
        self.frozen = False
        self.database_offset = 1_000_000.0
        self.server = 'history-1'
        self.owner_checked = True
        self.leases_checked = True
        self.tasks_checked = True
        self.restart_delay: tuple[float, float] | None = None
        self.history: deque[str] = deque(maxlen=tracing or 1)
        self.steps = 0
        self.audited: set[str] = set()
        self.spawn: Callable[[SimNode], None] | None = None
        self._tracing = bool(tracing)
        self._real_claims = real_claims
        self._heap: list[tuple[float, int, Callable[..., object], tuple[Any, ...]]] = []
        self._order = 0
        self._numbers = 0
        self._connections: dict[int, SimNode] = {}
        self._connection_of_request: dict[tuple[int, int], int] = {}
        self._next_connection = 0
        self._waiting: list[tuple[SimNode, Request, int, float, int | None]] = []  # statements that reached a frozen server
        self._gone: set[int] = set()
        self._last_end: dict[str, float] = {}
        self._answers: dict[str, tuple[SimNode, str]] = {}
        self._owned: dict[str, int] = {}
        self._owned_at = -1

    # --- time ---

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

    def trace(self, node: SimNode | None, what: str, detail: object) -> None:
        """Remember an event for the report of a failure."""
        if self._tracing:
            own = f'{node.local():10.3f} {node!s:8}' if node is not None else ' ' * 19
            self.history.append(f'{self.now:10.4f} {own} {what:12} {detail}')

    def next_number(self) -> int:
        self._numbers += 1
        return self._numbers

    def new_claims(self, total_tokens: int) -> Any:
        if self._real_claims:
            return MappedClaims(total_tokens)
        return SimClaims(total_tokens)

    # --- nodes ---

    def add(self, node: SimNode) -> SimNode:
        """Start a process."""
        self.nodes.append(node)
        self.holders.append(node)
        self.trace(node, 'starts', '')
        self.at(self.now, node.step)
        return node

    def live(self) -> list[SimNode]:
        """The processes that run."""
        return [node for node in self.nodes if node.running]

    def is_gone(self, process: Process) -> bool:
        return process.pid in self._gone

    def ended(self, node: SimNode) -> None:
        """A process ended by itself; its supervisor starts it again unless it left or may not be."""
        self._remove(node)
        if isinstance(node.error, ClusterNotFormed):
            raise Violation(f'{node} failed: {node.error}')
        if isinstance(node.error, DuplicateNodeName):
            if not any(other.name == node.name for other in self.nodes) and self.now - self._last_end.get(node.name, 0.0) > node.settings.timeout:
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

    # --- the network and the server ---

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
                self.at(deadline + rng.random() * node.settings.timeout, self._execute_late, node, request, request_id, deadline, node.connection)
            self.at(deadline, node.fail, request_id)
            return
        late = network.late_gives if isinstance(request, Give) else network.late_leads if isinstance(request, Lead) else network.late
        if late and rng.random() < late:
            self.at(deadline + rng.random() * network.lateness, self._execute_late, node, request, request_id, deadline, node.connection)
            self.at(deadline, node.fail, request_id)
            return
        self.at(self.now + self._one_way(), self._execute, node, request, request_id, deadline, node.connection)

    def _execute_late(self, node: SimNode, request: Request, request_id: int, deadline: float, connection: int | None) -> None:
        if not node.cut_up and self.up and not self.frozen and connection in self._connections:
            self._answer(node, request)

    def _execute(self, node: SimNode, request: Request, request_id: int, deadline: float, connection: int | None) -> None:
        """The request reaches the server."""
        if not self.up or (connection not in self._connections and not isinstance(request, Connect)):
            self._refuse(node, request_id, deadline)
            return
        if self.frozen:
            self._waiting.append((node, request, request_id, deadline, connection))
            self.at(max(deadline, self.now), node.fail, request_id)
            return
        if isinstance(request, Connect):
            reply: Reply = Connected(self.server)
            self._next_connection += 1
            self._connections[self._next_connection] = node
            self._connection_of_request[node.number, request_id] = self._next_connection
            node.deaf = False
        else:
            reply = self._answer(node, request)
        lost = node.cut_down or (self.network.lost_reply and self.rng.random() < self.network.lost_reply)
        arrival = self.now + self._one_way()
        if lost or arrival >= deadline:
            self.at(max(deadline, self.now), node.fail, request_id)
        else:
            self.at(arrival, self._arrive, node, request_id, reply, deadline)

    def _arrive(self, node: SimNode, request_id: int, reply: Reply, deadline: float) -> None:
        if node.cut_down:
            self.at(max(deadline, self.now), node.fail, request_id)
        else:
            node.receive(request_id, reply)

    def _refuse(self, node: SimNode, request_id: int, deadline: float) -> None:
        at_once = not node.cut_down and not node.cut_up
        self.at(self.now + self._one_way() if at_once else max(deadline, self.now), node.fail, request_id)

    def _answer(self, node: SimNode, request: Request) -> Reply:
        store = self.store
        store.clock = self.now + self.database_offset
        reply = store.handle(request)
        if isinstance(request, (Beat, Refresh)) and reply is not None and store.nodes[request.name].incarnation != request.incarnation:
            raise Violation(f'lives: {request} of {node} is answered for another life: {store.nodes[request.name].sign}')
        self.trace(node, 'executed', f'{type(request).__name__} -> {reply}')
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
                if self.network.lost_notification and self.rng.random() < self.network.lost_notification:
                    continue
                self.at(self.now + self._one_way(), node.notify, payload)
        store.outbox.clear()

    def connection_of(self, node: SimNode, request_id: int) -> int | None:
        connection = self._connection_of_request.pop((node.number, request_id), None)
        return connection if connection in self._connections else None

    def has_connection(self, connection: int) -> bool:
        return connection in self._connections

    # --- faults of the server ---

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
        """The server goes on, with everything that was sent meanwhile, whether its sender still waits or not."""
        if not self.frozen:
            return
        self.trace(None, 'server resumes', '')
        self.frozen = False
        waiting, self._waiting = self._waiting, []
        for node, request, request_id, deadline, connection in waiting:
            self.at(self.now + self._one_way(), self._execute, node, request, request_id, deadline, node.connection)

    def fail_over(self, standby: SimStore) -> None:
        """A standby that lacks the last writes becomes the server; the old one is fenced off."""
        self.stop_server()
        changes = self.store.changes
        self.store = standby
        self.store.on_plan = self._planned
        self.store.changes = changes + 1
        self.server += "'"
        self.trace(None, 'failover', f'version {standby.version}')

    def restore(self, backup: SimStore) -> None:
        """The same server comes back with the tables of a backup."""
        server = self.server
        self.fail_over(backup)
        self.server = server
        self.start_server()

    # --- what is checked along the way ---

    def _planned(self, members: Any, before: Any, pins: Any, decision: Any) -> None:
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
            if other.running and open_promise and row is not None and row.incarnation == incarnation == other.protocol.incarnation:
                raise Violation(f'tasks: {node} may take {task}, which the live {other} was told that it may take')
        if task in self.audited:
            raise Violation(f'tasks: {node} may take {task}, which is audited')
        self._answers[task] = (node, node.protocol.incarnation)

    def accepted(self, node: SimNode, task: str) -> None:
        """A claim was recorded; the store has ruled out that two live nodes hold one."""
        self.trace(node, 'took', task)

    def whole(self) -> str | None:
        """Why the cluster is not whole; None if it is."""
        return unsettled(self)


class MappedClaims(Claims):
    """The real claims, with the mask that the invariants read taken from the very bits that users' code reads."""

    @property
    def mask(self) -> int:
        return int.from_bytes(bytes(self.bits), 'little')

    def answers(self, now: float) -> int:
        """The tokens for which `may_claim` says True, as bits."""
        return sum(1 << token for token in range(self.total_tokens) if self.may_claim(token, now))
