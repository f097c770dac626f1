"""The node behind a FakeJob: its ownership is what the test says."""

from __future__ import annotations

import datetime
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from ..assignment.arguments import LockRow
from ..assignment.hashing import check_task_id, task_to_token
from ..assignment.tokens import TokenSet
from ..errors import ClaimLost, ConfigurationError
from ..protocol.effects import RebalanceEvent
from ..protocol.pausing import Pausing
from ..results import AuditedTask, CoordinationStatus, Explanation, LockInfo, NodeInfo
from ..task import task_id_of
from .memory import MemoryLedger

__all__ = ['FakeNode']

#: Seconds after which the first on_rebalance comes although the block does not seem to have begun.
_BINDING_SEC = 1.0


class FakeNode:
    """A node without a cluster and without a database: what stands behind a `FakeJob`, whose
    docstring tells what a test sets and reads. Methods without a docstring do what `Node` says.

    Args:
        name: Its name.
        total_tokens, hash_function: Which token a task has.
        on_rebalance, on_release: Called where tokens change, in the same thread; what they raise is
            raised.
    """

    def __init__(
        self,
        name: str,
        total_tokens: int,
        hash_function: str,
        on_rebalance: Callable[[RebalanceEvent], object] | None,
        on_release: Callable[[TokenSet], object] | None,
    ) -> None:
        self._name = name
        self._total_tokens = total_tokens
        self._hash_function = hash_function
        self._on_rebalance = on_rebalance
        self._on_release = on_release
        self._is_entered = False
        self._groups: tuple[str, ...] = ()
        self._drained: TokenSet | None = None
        self._initial: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._changed = threading.Condition()
        self.all = TokenSet.of(range(total_tokens))
        self.owned = self.all
        self.version = 1
        self.leased = True
        self.leader = True
        self.locks: dict[str, LockInfo] = {}
        self.claimed: list[Any] = []
        self.added: list[Any] = []
        self.audited: list[Any] = []
        self.asked: list[Any] = []
        self.ledger = MemoryLedger()
        self.pausing = Pausing()

    def tokens_of(self, task_ids: Iterable[object]) -> TokenSet:
        """The tokens of tasks."""
        return TokenSet.of(self.token_of(task_id) for task_id in task_ids)

    def own(self, tokens: TokenSet) -> None:
        """Have these tokens from now on: `on_release` is called first with those that go."""
        self.await_initial()
        gone, new = self.owned - tokens, tokens - self.owned
        if not gone and not new:
            return
        if gone and self._on_release is not None and self._is_entered:
            self._on_release(gone)
        self.owned = tokens
        self.version += 1
        self.wake()
        self._rebalanced(False, len(new), len(gone))

    def _rebalanced(self, initial: bool, added: int, removed: int) -> None:
        if self._on_rebalance is not None and self._is_entered:
            self._on_rebalance(RebalanceEvent(initial, self.version, added, removed))

    def enter(self, provide: Callable[[], object], is_worker: bool) -> None:
        provide()
        self._is_entered = True

    def entered(self, is_bound: Callable[[], bool]) -> None:
        """The first call comes in another thread, when `with … as job` has bound the name."""
        if self._on_rebalance is None:
            return
        tell_user, event = (
            self._on_rebalance,
            RebalanceEvent(True, self.version, len(self.owned), 0),
        )

        def tell() -> None:
            deadline, pause = time.monotonic() + _BINDING_SEC, threading.Event()
            while not is_bound() and time.monotonic() < deadline:
                pause.wait(0.0005)
            try:
                tell_user(event)
            except BaseException as error:
                self._failure = error

        self._initial = threading.Thread(target=tell, name='jobsync-callbacks', daemon=True)
        self._initial.start()

    def await_initial(self) -> None:
        """Whatever a test does with the Job comes after the first call; what that raised is raised
        here.
        """
        initial = self._initial
        if initial is None or initial is threading.current_thread():
            return
        initial.join()
        self._initial = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def leave(self, error: BaseException | None) -> None:
        """What was added is audited; after an error, all but the last."""
        try:
            self.await_initial()
        finally:
            if error is not None:
                self.added = self.added[:-1]
            self.audit()
            self._is_entered = False
            self.ledger.close()

    def leave_child(self, error: BaseException | None) -> None:
        """Nothing to do."""

    def hurry(self) -> None:
        """There is no database."""

    @property
    def hurried(self) -> bool:
        return False

    def give_up(self) -> None:
        """Entering does not wait."""

    def disown(self, mark: str) -> None:
        """Nothing to do."""

    def can_claim(self, task: object) -> bool:
        if not self._is_entered:
            return False
        self.await_initial()
        token = self.token_of(task)
        self.asked.append(task_id_of(task))
        return self.leased and token in self.owned

    def owns(self, task_id: object, group: str = '') -> bool:
        """In every queue group the same."""
        return self._is_entered and self.leased and self.token_of(task_id) in self.owned

    def enroll(self, groups: Iterable[str]) -> None:
        """It belongs to every queue group; these are told of."""
        self._groups = tuple(sorted({*groups} - {''}))

    def holds(self, group: str) -> bool:
        return self._is_entered

    def group_token_of(self, task_id: object, group: str) -> int | None:
        """In every queue group the same."""
        return self.token_of(task_id)

    def add(self, task: object) -> None:
        """Remember it for the test.

        Raises:
            ClaimLost: This node does not own the task.
        """
        self._claim(task)
        self.added.append(task_id_of(task))

    def record(self, batch: Sequence[object]) -> None:
        """Remember them for the test.

        Raises:
            ClaimLost: This node does not own one of the tasks; the others are recorded.
        """
        lost: ClaimLost | None = None
        for one in batch:
            try:
                self._claim(one)
            except ClaimLost as error:
                lost = error
        if lost is not None:
            raise lost

    def _claim(self, task: object) -> None:
        if not self.owns(task):
            raise ClaimLost(
                f'node {self._name!r} does not own {task_id_of(task)!r}: the test said so, by '
                '`owned`, `lose` or `healthy`'
            )
        self.claimed.append(task_id_of(task))

    def audit(self) -> None:
        self.audited += self.added
        self.added = []

    def get_audit(self) -> list[AuditedTask]:
        return [{'node': self._name, 'task_id': check_task_id(task_id)} for task_id in self.audited]

    def token_of(self, task_id: object) -> int:
        return task_to_token(task_id_of(task_id), self._total_tokens, self._hash_function)

    def owner_of(self, task_id: object) -> str | None:
        """This node or nobody."""
        return self._name if self.token_of(task_id) in self.owned else None

    def explain(self, task_id: object) -> Explanation:
        """With `task_id`, `token` and `owner` alone."""
        return {
            'task_id': check_task_id(task_id_of(task_id)),
            'token': self.token_of(task_id),
            'owner': self.owner_of(task_id),
        }

    @property
    def tokens(self) -> TokenSet:
        self.await_initial()
        return self.owned if self.leased and self._is_entered else TokenSet()

    @property
    def incarnation(self) -> str:
        return f'{self._name} of a test'

    @property
    def has_lease(self) -> bool:
        return self.leased

    @property
    def is_healthy(self) -> bool:
        return self.leased

    @property
    def is_running(self) -> bool:
        return True

    @property
    def leads(self) -> bool:
        return self.leader and self.leased

    def status(self, state: str) -> CoordinationStatus:
        entered = state == 'entered'
        return {
            'coordination_enabled': True,
            'node_name': self._name,
            'incarnation': self.incarnation,
            'state': ('draining' if self._drained is not None else 'active') if entered else state,
            'is_leader': entered and self.leads,
            'healthy': entered and self.leased,
            'my_tokens': len(self.tokens),
            'groups': {group: len(self.tokens) for group in self._groups},
            'token_version': self.version,
            'total_tokens': self._total_tokens,
            'last_heartbeat': None,
            'lease_remaining_sec': 60.0 if self.leased else 0.0,
            'evictions': 0,
            'callback_failures': 0,
            'callbacks_slow': 0,
            'executions_unsettled': 0,
            'recent_events': [],
        }

    @property
    def is_alone(self) -> bool:
        return True

    def list_nodes(self) -> list[NodeInfo]:
        return [{'name': self._name, 'alive': True}]

    def count_active(self) -> int | None:
        return 1

    def session(self, *, pinned: bool = False) -> AbstractContextManager[Any]:
        """There is none.

        Raises:
            ConfigurationError: Always.
        """
        raise ConfigurationError(
            'a FakeJob has no database: test this with the fixture jobsync_node'
        )

    def rest(self) -> None:
        """Nothing to do."""

    def wait_until(self, condition: Callable[[], bool], timeout: float) -> bool:
        """Looked at whenever the test changes something."""
        with self._changed:
            return self._changed.wait_for(condition, timeout)

    def wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def drain(self, timeout: float | None) -> bool:
        if self._drained is None:
            self._drained = self.owned
            self.own(TokenSet())
        return True

    def undrain(self) -> None:
        if self._drained is not None:
            before, self._drained = self._drained, None
            self.own(before)

    def stand_aside(self, aside: bool) -> None:
        """A worker does so that is cut off from its broker; a test's is no worker's."""

    def register_locks(self, rows: Sequence[LockRow]) -> int:
        """The fake's ownership does not follow them."""
        now = datetime.datetime.now(datetime.timezone.utc)
        for task_id, patterns, reason, days, queue in rows:
            self.locks[task_id] = {
                'task_id': task_id,
                'node_patterns': list(patterns),
                'reason': reason,
                'created_at': now,
                'created_by': self._name,
                'expires_at': now + datetime.timedelta(days=days) if days is not None else None,
                'queue': queue,
            }
        return len(rows)

    def list_locks(self) -> list[LockInfo]:
        return [lock.copy() for lock in self.locks.values()]

    def clear_locks(self, creator: str | None = None) -> int:
        if creator not in (None, self._name):
            return 0
        count = len(self.locks)
        self.locks.clear()
        return count
