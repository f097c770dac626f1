"""One process of the simulation: what the agent does, under virtual time, and what the user's code
is told.
"""

from __future__ import annotations

from array import array
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from jobsync_core.assignment.groups import PLAIN, window
from jobsync_core.assignment.model import Range
from jobsync_core.assignment.tokens import TokenSet
from jobsync_core.process import Process
from jobsync_core.protocol.effects import Entered, Failed, Left, RebalanceEvent, Release
from jobsync_core.protocol.messages import Reply, Request
from jobsync_core.protocol.messages.connection import Connect, ConnectReply
from jobsync_core.protocol.messages.handover import Give, Refresh, Take
from jobsync_core.protocol.messages.leadership import Evict, Lead, RoundReply, StepDown
from jobsync_core.protocol.messages.membership import HeartbeatReply, Leave
from jobsync_core.protocol.node import BESIDE, Phase, Protocol, Settings
from jobsync_core.protocol.ownership import Ownership

from .invariants import Violation
from .masks import bit_of, mask_of, window_mask
from .store import task_key, token_of

if TYPE_CHECKING:
    from .world import World

__all__ = ['LEASE_FRACTION', 'TASKS_PER_TOKEN', 'MappedOwnership', 'SimOwnership', 'SimNode']

#: Requests that one node may send within one poll interval; more is a busy loop.
_MOST_REQUESTS = 40
LEASE_FRACTION = 0.9
#: Ids of queue groups that a simulation gives at most.
_GROUPS = 6
TASKS_PER_TOKEN = 2


class SimOwnership(Ownership):
    """Ownership without shared memory; `mask` is the token set as bits."""

    def __init__(self, total_tokens: int) -> None:
        self.total_tokens = total_tokens
        self.lease = [0.0]  # type: ignore[assignment]  # a list is as good as a view of doubles
        self._tokens = TokenSet()
        self.excluded: set[int] = set()
        self.mask = 0
        self._life = bytearray(64)  # type: ignore[assignment]  # as good as a view of bytes

    @property
    def tokens(self) -> TokenSet:
        return self._tokens

    def may_claim(self, token: int, now: float) -> bool:
        return now < self.lease[0] and bool(self.mask >> bit_of(token) & 1)

    def replace(self, tokens: TokenSet) -> None:
        self._tokens = tokens
        self.mask = mask_of(tokens.ranges)

    def exclude(self, ranges: Sequence[Range], keys: array[int]) -> None:
        shift = 64 - (self.total_tokens - 1).bit_length()
        self.excluded = {
            key for key in self.excluded if not any(lo <= key >> shift < hi for lo, hi in ranges)
        } | set(keys)

    def excludes(self, task: str) -> bool:
        """Whether the task is excluded."""
        return task_key(task, self.total_tokens) in self.excluded

    def answers(self, now: float) -> int:
        """The tokens for which `may_claim` says True, as bits."""
        return self.mask if now < self.lease[0] else 0


class MappedOwnership(Ownership):
    """The real one, with the mask that the invariants read taken from the very bits that users'
    code reads.
    """

    @property
    def mask(self) -> int:
        others = self.tokens - TokenSet([window(PLAIN, self.total_tokens)])
        return int.from_bytes(bytes(self.bits), 'little') | mask_of(others.ranges)

    def excludes(self, task: str) -> bool:
        """Whether the task is excluded."""
        return self.exclusions.excludes(token_of(task), task)

    def answers(self, now: float) -> int:
        """The tokens for which `may_claim` says True, as bits."""
        return sum(
            1 << bit_of(token)
            for group in range(_GROUPS)
            for token in range(*window(group, self.total_tokens))
            if self.may_claim(token, now)
        )


class SimNode:
    """One process: a protocol, its ownership, its clock, and what its user's code has been told."""

    def __init__(
        self,
        world: World,
        name: str,
        settings: Settings,
        *,
        rate: float,
        offset: float,
        machine: int,
        release_times: Callable[[], float],
        is_old: bool = False,
    ) -> None:
        self.world = world
        self.name = name
        self.settings = settings
        self.rate = rate
        self.offset = offset
        self.number = world.next_number()
        self.machine = machine
        self._lives = 0
        self.ownership = world.new_ownership(settings.total_tokens)
        self.process = Process(f'host{machine}', f'boot{machine}', 'ns', self.number, '')
        self.protocol = Protocol(
            name,
            settings,
            self.process,
            self.ownership,
            new_incarnation=self._new_incarnation,
            is_known_dead=self._is_known_dead,
            promises=self._promises,
        )
        self.running = True
        self.paused = False
        self.error: Exception | None = None
        #: It runs a version that knows of no queue groups.
        self.is_old = is_old
        #: The queue groups that its user wants, and those whose queues it consumes.
        self.wants: frozenset[str] = frozenset(settings.groups)
        self.consumes: frozenset[str] = frozenset()
        self.consumed = 0
        self._consume(self.wants | {''})
        self.wanted = True  # a supervisor starts it again when it ends by itself
        self.cut_up = self.cut_down = False
        self.deaf = False
        self.entered = False
        self.lease_bound = 0.0
        #: While another history's leases may be valid, as the answers tell it; kept apart from what
        #: the protocol makes of them.
        self.waits_until = 0.0
        self._heard: int | None = None  # which server answered the last heartbeat that was answered
        self.sent: Counter[str] = Counter()
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
        self._mail: list[tuple[int, Reply, int]] = []
        self._inbox: deque[str] = deque()
        self._release_times = release_times
        self._releases: dict[int, tuple[int, float]] = {}
        self._release_free_at = 0.0
        self._recent: deque[float] = deque(maxlen=_MOST_REQUESTS)
        self._failing_since: float | None = None
        self._writes_plan = False  # in pieces, each of which takes a request
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

    @property
    def asks_for_rows(self) -> bool:
        """Whether it waits for an answer to a Refresh."""
        return isinstance(self._request, Refresh)

    def _consume(self, groups: frozenset[str]) -> None:
        if groups != self.consumes:
            self.consumes = groups
            slots = (self.world.slot(group) for group in groups)
            self.consumed = sum(window_mask(slot) for slot in slots)

    def enroll(self, groups: frozenset[str]) -> None:
        """The user has it consume these queues; what it leaves it goes on to consume while it holds
        something there.
        """
        if self.running and not self.paused and not self.is_old:
            self.wants = groups
            self._consume(self.consumes | groups)
            self.world.trace(self, 'enrolls', sorted(groups))
            self.protocol.enroll(groups, self.local())
            self.step()

    def _stop_consuming(self) -> None:
        if self.consumes - self.wants - {''}:
            left = {g for g in self.consumes - self.wants if not self.protocol.holds(g)}
            self._consume(self.consumes - left)

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
        self._stop_consuming()
        if protocol.phase in (Phase.LEFT, Phase.FAILED):
            self._end()
        elif request is None:
            self._sleep(now)
        else:
            self._send(request, now)

    def _sleep(self, now: float) -> None:
        if self.protocol.drained:
            row = self.world.store.nodes.get(self.name)
            mine = row is not None and row.incarnation == self.protocol.incarnation
            if (
                row is not None
                and mine
                and row.state == 'draining'
                and self.world.owned(self.name)
                and self.world.owner_checked
            ):
                raise Violation(
                    f'drain: {self} says that it has given everything away, and has tokens'
                )
        wake = self.protocol.wake_at
        if wake <= now:
            raise Violation(
                f'no-spin: {self} has nothing to send at {now:.6f} but wants to wake at {wake:.6f}'
            )
        self._wake_id += 1
        if wake < float('inf'):
            self.world.at(
                max(self.true_time(wake), self.world.now) + 1e-6, self._wake, self._wake_id
            )

    def _wake(self, wake_id: int) -> None:
        if wake_id == self._wake_id:
            self.step()

    def _send(self, request: Request, now: float) -> None:
        recent = self._recent
        if len(recent) == _MOST_REQUESTS and now - recent[0] < self.settings.poll:
            raise Violation(
                f'no-spin: {self} sent {_MOST_REQUESTS} requests within {now - recent[0]:.3f} s, '
                f'last {request}'
            )
        if not (self._writes_plan and isinstance(request, (Lead, Refresh))):
            recent.append(now)
        self.sent[type(request).__name__] += 1
        if (
            isinstance(request, (Take, Give, Evict, Lead, StepDown))
            and now < self.waits_until - 1e-6
        ):
            raise Violation(
                f'quarantine: {self} sends {request} although leases of another history may be '
                'valid'
            )
        if isinstance(request, (Give, Leave)):
            self._check_release_order(request, now)
        self._wake_id += 1
        self._request = request
        self._request_id += 1
        self._sent_local = now
        self._deadline = now + (
            self.connect_timeout if isinstance(request, Connect) else self.op_timeout
        )
        world = self.world
        world.trace(self, 'sends', request)
        if isinstance(request, Connect):
            self.connection = None
        world.transmit(self, request, self._request_id, self.true_time(self._deadline))

    def _check_release_order(self, request: Give | Leave, now: float) -> None:
        leaving = mask_of(request.ranges) if isinstance(request, Give) else -1
        for mask, deadline in self._releases.values():
            if mask & leaving and now < deadline - 1e-6:
                raise Violation(
                    f'on_release: {self} gives tokens away by {request} while on_release runs for '
                    'them'
                )

    def receive(self, request_id: int, reply: Reply, origin: int) -> None:
        """The reply of one server has arrived at the process's socket."""
        if not self.running or request_id != self._request_id or self._request is None:
            return
        if self.paused:
            self._mail.append((request_id, reply, origin))
            return
        request, self._request = self._request, None
        if isinstance(reply, ConnectReply):
            self.connection = self.world.connection_of(self, request_id)
            if self.connection is None:
                self._failed(request)
                return
        self._note_history(reply, origin)
        if isinstance(reply, HeartbeatReply):
            self.lease_bound = max(
                self.lease_bound, self._sent_local + LEASE_FRACTION * self.settings.timeout
            )
        self._failing_since = None
        if isinstance(reply, RoundReply):
            self._writes_plan = reply.more
        self.world.trace(self, 'hears', reply)
        self.protocol.reply(request, reply, self.local())
        self._run_effects()
        self._stop_consuming()
        self.step()

    def _note_history(self, reply: Reply, origin: int) -> None:
        """Remember until when leases of another server may be valid. Where answers name no history,
        a new node cannot know.
        """
        if isinstance(reply, HeartbeatReply) and origin != self._heard:
            if self._heard is not None or self.world.store.tells_history:
                self.waits_until = self.offset + self.rate * self.world.may_hold_foreign_leases(
                    origin
                )
            self._heard = origin

    def refuse(self, request_id: int) -> None:
        """The server answers that it cannot."""
        if (
            not self.running
            or self.paused
            or request_id != self._request_id
            or self._request is None
        ):
            return
        if not isinstance(self._request, BESIDE):
            self.fail(request_id)
            return
        request, self._request = self._request, None
        self.world.trace(self, 'is refused', request)
        self.protocol.refused(request, self.local())
        self._run_effects()
        self.step()

    def fail(self, request_id: int) -> None:
        """The request's time is up, or its connection broke."""
        if (
            not self.running
            or self.paused
            or request_id != self._request_id
            or self._request is None
        ):
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
        if protocol.phase is Phase.JOINING:
            hopeless = isinstance(request, Connect)
        else:
            hopeless = now - self._failing_since > self.settings.timeout
        if protocol.phase is Phase.LEAVING or (hopeless and not protocol.entered):
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
        self.ownership.suspend()
        self.running = False
        self.world.trace(self, 'ends', self.error or self.protocol.phase)
        self.world.ended(self)

    def pause(self) -> None:
        """SIGSTOP."""
        if self.running:
            self.paused = True
            self.world.trace(self, 'paused', '')

    def resume(self) -> None:
        """SIGCONT. The user's code may run first; then the agent finds a reply, a time-out, or
        both.
        """
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
            raise Violation(
                f'events: {self} got is_initial={event.is_initial} as event number {self.events}'
            )
        if self.announced < 0:
            raise Violation(
                f'events: {self} was told of {-self.announced} more removed tokens than added ones'
            )

    def _release(self, effect: Release) -> None:
        now = self.local()
        self._releases[effect.number] = (
            mask_of(effect.tokens.ranges),
            now + self.settings.release_timeout,
        )
        start = max(self.world.now, self._release_free_at)
        self._release_free_at = start + self._release_times()
        if effect.number % 2:
            # One that tells what is still in use: half of it, in parts of rows.
            used = TokenSet.of([*effect.tokens][::2])
            self.world.at(start, self._release_went_on, effect.number, used)
        self.world.at(self._release_free_at, self._released, effect.number)

    def _release_went_on(self, number: int, used: TokenSet) -> None:
        if not self.running or self.paused or number not in self._releases:
            return
        self._releases[number] = mask_of(used.ranges), self._releases[number][1]
        self.world.trace(self, 'release went on', number)
        self.protocol.release_went_on(number, used, self.local())
        self.step()

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

    def _promises(self, tokens: TokenSet) -> tuple[tuple[str, int], ...]:
        return tuple((task, token) for task, token in self.promised.items() if token in tokens)

    def can_claim(self, task: str) -> bool:
        """What TaskClaims.can_claim answers."""
        if not self.ownership.may_claim(token_of(task), self.local()):
            return False
        if task in self.taken or task in self.done:
            return False
        if self.ownership.excludes(task):
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
            mine = {
                task
                for task in self.taken
                if store.live_claim(task) == (self.name, self.protocol.incarnation)
            }
            store.audit(self.name, mine)
            self.world.audited |= mine
            self.world.trace(self, 'audits', mine)
            self.done |= mine
            self.taken -= mine

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

    def drain(self, draining: bool, by_itself: bool = False) -> None:
        """`job.drain()` or `job.undrain()`; by itself, `job.stand_aside()`."""
        if self.running and not self.paused:
            change = self.protocol.drain if draining else self.protocol.undrain
            change(self.local(), by_itself)
            self.step()

    def crash(self) -> None:
        """SIGKILL."""
        if self.running:
            self.running = False
            self.ownership.suspend()
            self.world.trace(self, 'crashed', '')
            self.world.crashed(self)
