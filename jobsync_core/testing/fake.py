"""A Job without a cluster and without a database, whose ownership the test sets."""
from __future__ import annotations

import datetime
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from ..agent.callbacks import with_event
from ..assignment.arguments import check_locks
from ..assignment.hashing import check_task_id, task_to_token
from ..assignment.tokens import TokenSet
from ..config import CoordinationConfig
from ..errors import ClaimLost, ConfigurationError
from ..job import Job
from ..ledger.binding import Binding
from ..ledger.current import enter_ledger, leave_ledger
from ..protocol.effects import RebalanceEvent
from ..task import Task, task_id_of
from ..worker.plugin import set_stand_in, stand_in
from .memory import MemoryLedger

__all__ = ['FakeJob', 'standing_in']

#: As the plugins have it: two ids of a test hardly ever share a token.
_TOTAL_TOKENS = 1_000_000
#: Seconds after which the first on_rebalance comes although the block does not seem to have begun.
_BINDING_SEC = 1.0


@contextmanager
def standing_in(job: Job) -> Iterator[Job]:
    """Let the workers of this process, and its exactly-once functions, use this Job, which was entered, in place of a node of their own.

    A FakeJob does that by itself. Workers, of whatever broker, then run all that they receive.

    Raises:
        ConfigurationError: Another Job stands in already.
    """
    other = stand_in()
    if other is not None and other is not job:
        raise ConfigurationError(f'{other!r} stands in already, beside it {job!r} cannot: leave the first one before')
    set_stand_in(job)
    enter_ledger(job._ledger)
    try:
        yield job
    finally:
        set_stand_in(None)
        leave_ledger(job._ledger)


class FakeJob(Job):
    """A Job for tests: it owns what the test says, keeps its ledger in memory, and remembers what was claimed.

    Enter it as a Job. While it is entered, it stands in for the node of workers in this process. Takes the arguments of Job too, so that
    it can be put in the place of the class; those that only a cluster needs are ignored.

    Args:
        node_name: The node's name.
        coordination_config: Gives the number of tokens and the hash function; never connected to.
        owned: Ids of the tasks that it owns at first; None: all tasks.
        on_rebalance, on_release: As for Job; called by `own` and `lose`, in the same thread, and what they raise is raised. The first
            call of on_rebalance comes as with a Job, in another thread, as soon as the block has begun; whatever is done with this
            object then waits for it, and raises what it raised.

    Attributes:
        ledger: The MemoryLedger.
        claimed: Ids of tasks that were recorded by `add_task` or `set_claim`, in order.
        added: Those of `add_task` that were not audited yet.
        audited: Those that were.
        asked: Ids that `can_claim_task` was asked for.
        locks: Task id -> patterns, of the locks that were registered.
        leader: What `am_i_leader` says while there is a lease; settable.
    """

    def __init__(
        self,
        node_name: str = 'test-node',
        coordination_config: CoordinationConfig | None = None,
        date: datetime.date | datetime.datetime | None = None,
        wait_on_enter: float = 0,
        wait_on_exit: float = 0,
        lock_provider: Callable[[Job], object] | None = None,
        clear_existing_locks: bool = False,
        on_rebalance: Callable[..., object] | None = None,
        *,
        on_release: Callable[[TokenSet], object] | None = None,
        weight: float = 1.0,
        resume: bool = False,
        owned: Iterable[Task | Hashable] | None = None,
    ) -> None:
        super().__init__(
            node_name, None, date, wait_on_enter, wait_on_exit, lock_provider, clear_existing_locks, on_rebalance,
            on_release=on_release, weight=weight, resume=resume)
        self._total_tokens = coordination_config.total_tokens if coordination_config is not None else _TOTAL_TOKENS
        self._hash_function = coordination_config.hash_function if coordination_config is not None else 'double_sha256'
        self._on_rebalance = with_event(on_rebalance) if on_rebalance is not None else None
        self._on_release = on_release
        self._all = TokenSet.of(range(self._total_tokens))
        self._tokens = self._all if owned is None else self._tokens_of(owned)
        self._drained: TokenSet | None = None
        self._initial: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._leased = True
        self._version = 1
        self._changed = threading.Condition()
        self._created: dict[str, dict[str, Any]] = {}
        self._ledger = self.ledger = MemoryLedger()
        self.claimed: list[Any] = []
        self.added: list[Any] = []
        self.audited: list[Any] = []
        self.asked: list[Any] = []
        self.leader = True

    # --- what a test sets ---

    def own(self, *task_ids: Task | Hashable) -> None:
        """Gain these tasks, or all when none is given."""
        self._set_tokens(self._tokens | self._tokens_of(task_ids) if task_ids else self._all)

    def lose(self, *task_ids: Task | Hashable) -> None:
        """Lose these tasks, or all when none is given: `on_release` is called first, then they are gone."""
        self._set_tokens(self._tokens - self._tokens_of(task_ids) if task_ids else TokenSet())

    @property
    def healthy(self) -> bool:
        """Whether there is a lease; set it to False, and nothing can be claimed until it is True again."""
        return self._leased

    @healthy.setter
    def healthy(self, leased: bool) -> None:
        self._leased = leased
        self.wake()

    @property
    def locks(self) -> dict[str, list[str]]:
        """Task id -> patterns of the locks that were registered."""
        return {task_id: lock['node_patterns'] for task_id, lock in self._created.items()}

    def _tokens_of(self, task_ids: Iterable[Task | Hashable]) -> TokenSet:
        return TokenSet.of(self.task_to_token(task_id) for task_id in task_ids)

    def _set_tokens(self, tokens: TokenSet) -> None:
        self._await_initial()
        gone, new = self._tokens - tokens, tokens - self._tokens
        if not gone and not new:
            return
        if gone and self._on_release is not None and self._state == 'entered':
            self._on_release(gone)
        self._tokens = tokens
        self._version += 1
        self.wake()
        self._rebalanced(False, len(new), len(gone))

    def _rebalanced(self, initial: bool, added: int, removed: int) -> None:
        if self._on_rebalance is not None and self._state == 'entered':
            self._on_rebalance(RebalanceEvent(initial, self._version, added, removed))

    def _tell_initial(self, is_bound: Callable[[], bool]) -> None:
        """As with a Job, the first call comes in another thread, when `with … as job` has bound the name."""
        if self._on_rebalance is None:
            return
        event = RebalanceEvent(True, self._version, len(self._tokens), 0)

        def tell() -> None:
            deadline, pause = time.monotonic() + _BINDING_SEC, threading.Event()
            while not is_bound() and time.monotonic() < deadline:
                pause.wait(0.0005)
            try:
                self._on_rebalance(event)  # type: ignore[misc]  # there is one
            except BaseException as error:
                self._failure = error

        self._initial = threading.Thread(target=tell, name='jobsync-callbacks', daemon=True)
        self._initial.start()

    def _await_initial(self) -> None:
        """Whatever a test does with the job comes after the first call; what that raised is raised here."""
        initial = self._initial
        if initial is None or initial is threading.current_thread():
            return
        initial.join()
        self._initial = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _check_entered(self) -> None:
        super()._check_entered()
        self._await_initial()

    # --- entering and leaving ---

    def __enter__(self) -> FakeJob:
        """See Job."""
        if stand_in() is not None:
            raise ConfigurationError(f'{stand_in()!r} stands in already, beside it {self!r} cannot: leave the first one before')
        super().__enter__()
        try:
            self._state = 'entering'
            if self._lock_provider is not None:
                self._lock_provider(self)
            self._state = 'entered'
            set_stand_in(self)
            self._tell_initial(Binding().is_done)
        except BaseException:
            self._state = 'exited'
            set_stand_in(None)
            leave_ledger(self._ledger)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """See Job: what was added is audited; after an error, all but the last."""
        try:
            self._await_initial()
        finally:
            if self._state == 'entered' and stand_in() is self:
                set_stand_in(None)
                if error is not None:
                    self.added = self.added[:-1]
                self.write_audit()
            super().__exit__(kind, error, trace)

    # --- tasks ---

    def can_claim_task(self, task: Task | Hashable) -> bool:
        """See Job."""
        self._check_entered()
        token = self.task_to_token(task)
        self.asked.append(task_id_of(task))
        return self._leased and token in self._tokens

    def owns(self, task_id: Task | Hashable) -> bool:
        """See Job."""
        return self.am_i_healthy() and self.task_to_token(task_id) in self._tokens

    @property
    def has_lease(self) -> bool:
        """See Job."""
        return self._leased

    def add_task(self, task: Task | Hashable) -> None:
        """See Job.

        Raises:
            ClaimLost: This node does not own the task.
        """
        self._check_entered()
        self._claim(task)
        self.added.append(task_id_of(task))

    def set_claim(self, task: Task | Hashable | Iterable[Task | Hashable]) -> None:
        """See Job.

        Raises:
            ClaimLost: This node does not own one of the tasks; the others are recorded.
        """
        self._check_entered()
        several = isinstance(task, Iterable) and not isinstance(task, (str, bytes, tuple))
        batch: list[Any] = list(task) if several else [task]  # type: ignore[arg-type]
        lost: ClaimLost | None = None
        for one in batch:
            try:
                self._claim(one)
            except ClaimLost as error:
                lost = error
        if lost is not None:
            raise lost

    def _claim(self, task: Task | Hashable) -> None:
        if not self.owns(task):
            raise ClaimLost(f'node {self.node_name!r} does not own {task_id_of(task)!r}: the test said so, by `owned`, `lose` or `healthy`')
        self.claimed.append(task_id_of(task))

    def write_audit(self) -> None:
        """See Job."""
        self._check_entered()
        self.audited += self.added
        self.added = []

    def get_audit(self) -> list[dict[str, Any]]:
        """See Job."""
        self._check_entered()
        return [{'node': self.node_name, 'task_id': check_task_id(task_id)} for task_id in self.audited]

    def task_to_token(self, task_id: Task | Hashable) -> int:
        """See Job."""
        return task_to_token(task_id_of(task_id), self._total_tokens, self._hash_function)

    @property
    def my_tokens(self) -> TokenSet:
        """See Job."""
        self._await_initial()
        return self._tokens if self._leased and self._state == 'entered' else TokenSet()

    @property
    def token_version(self) -> int:
        """See Job."""
        return self._version

    @property
    def incarnation(self) -> str:
        """See Job."""
        return f'{self.node_name} of a test'

    def owner_of(self, task_id: Task | Hashable) -> str | None:
        """See Job: this node or nobody."""
        self._check_entered()
        return self.node_name if self.task_to_token(task_id) in self._tokens else None

    def explain(self, task_id: Task | Hashable) -> dict[str, Any]:
        """See Job: task_id, token and owner."""
        return {'task_id': check_task_id(task_id_of(task_id)), 'token': self.task_to_token(task_id), 'owner': self.owner_of(task_id)}

    # --- for adapters ---

    def wait_until(self, condition: Callable[[], bool], timeout: float) -> bool:
        """See Job: looked at whenever the test changes something."""
        with self._changed:
            return self._changed.wait_for(condition, timeout)

    def wake(self) -> None:
        """See Job."""
        with self._changed:
            self._changed.notify_all()

    # --- drain ---

    def drain(self, timeout: float | None = None) -> bool:
        """See Job."""
        self._check_entered()
        if self._drained is None:
            self._drained = self._tokens
            self.lose()
        return True

    def undrain(self) -> None:
        """See Job."""
        self._check_entered()
        if self._drained is not None:
            before, self._drained = self._drained, None
            self._set_tokens(before)

    # --- locks ---

    def register_locks_bulk(self, locks: Iterable[Sequence[Any]]) -> int:
        """See Job. The fake's ownership does not follow them."""
        self._check_member()
        rows = check_locks(locks)
        now = datetime.datetime.now(datetime.timezone.utc)
        for task_id, patterns, reason, days in rows:
            self._created[task_id] = {
                'task_id': task_id, 'node_patterns': list(patterns), 'reason': reason, 'created_at': now, 'created_by': self.node_name,
                'expires_at': now + datetime.timedelta(days=days) if days is not None else None}
        return len(rows)

    def list_locks(self) -> list[dict[str, Any]]:
        """See Job."""
        self._check_member()
        return [dict(lock) for lock in self._created.values()]

    def clear_locks_by_creator(self, creator: str) -> int:
        """See Job."""
        return self.clear_all_locks() if creator == self.node_name else 0

    def clear_all_locks(self) -> int:
        """See Job."""
        self._check_member()
        count = len(self._created)
        self._created.clear()
        return count

    # --- the cluster ---

    def am_i_healthy(self) -> bool:
        """See Job."""
        return self._state == 'entered' and self._leased

    @property
    def alive(self) -> bool:
        """See Job."""
        return True

    def am_i_leader(self) -> bool:
        """See Job."""
        return self.leader and self.am_i_healthy()

    def _list_nodes(self) -> list[dict[str, Any]]:
        self._check_entered()
        return [{'name': self.node_name, 'alive': True}]

    def get_coordination_status(self) -> dict[str, Any]:
        """See Job."""
        return {**self.local_status(), 'active_nodes': 1 if self._state == 'entered' else None}

    def local_status(self) -> dict[str, Any]:
        """See Job."""
        return {
            'coordination_enabled': True, 'node_name': self.node_name, 'incarnation': self.incarnation,
            'state': ('draining' if self._drained is not None else 'active') if self._state == 'entered' else self._state,
            'is_leader': self.am_i_leader(), 'healthy': self.am_i_healthy(), 'my_tokens': len(self.my_tokens),
            'token_version': self._version, 'total_tokens': self._total_tokens, 'last_heartbeat': None,
            'lease_remaining_sec': 60.0 if self._leased else 0.0, 'evictions': 0, 'callback_failures': 0, 'callbacks_slow': 0,
            'executions_unsettled': 0, 'recent_events': [],
        }
