"""Single-node mode: one process that owns everything, without a cluster and without a database."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from ..assignment.arguments import LockRow
from ..assignment.hashing import check_task_id
from ..assignment.tokens import TokenSet
from ..errors import ConfigurationError
from ..ledger.single import SingleLedger
from ..protocol.pausing import Pausing
from ..results import AuditedTask, CoordinationStatus, Explanation, LockInfo, NodeInfo
from ..task import task_id_of

__all__ = ['SingleNode']


class SingleNode:
    """Every task is its own, and nothing is remembered. Methods without a docstring do what `Node`
    says.

    Args:
        name: Its name.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._is_entered = False
        self.ledger = SingleLedger()
        self.pausing = Pausing()

    def enter(self, provide: Callable[[], object], is_worker: bool) -> None:
        """There are no locks."""
        self._is_entered = True

    def entered(self, is_bound: Callable[[], bool]) -> None:
        """Tokens never change."""

    def leave(self, error: BaseException | None) -> None:
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
        check_task_id(task_id_of(task))
        return True

    def owns(self, task_id: object, group: str = '') -> bool:
        return True

    def enroll(self, groups: Iterable[str]) -> None:
        """It belongs to every queue group."""

    def holds(self, group: str) -> bool:
        return True

    def group_token_of(self, task_id: object, group: str) -> int | None:
        return 0

    def add(self, task: object) -> None:
        check_task_id(task_id_of(task))

    def record(self, batch: Sequence[object]) -> None:
        """Nothing to do."""

    def audit(self) -> None:
        """Nothing to do."""

    def get_audit(self) -> list[AuditedTask]:
        return []

    def token_of(self, task_id: object) -> int:
        return 0

    def owner_of(self, task_id: object) -> str | None:
        return self._name

    def explain(self, task_id: object) -> Explanation:
        return {'task_id': check_task_id(task_id_of(task_id)), 'token': 0, 'owner': self._name}

    @property
    def tokens(self) -> TokenSet:
        """There are no tokens."""
        return TokenSet()

    @property
    def version(self) -> int:
        return 0

    @property
    def incarnation(self) -> str:
        return ''

    @property
    def has_lease(self) -> bool:
        return True

    @property
    def is_healthy(self) -> bool:
        return True

    @property
    def is_running(self) -> bool:
        return True

    @property
    def leads(self) -> bool:
        """There is nobody to lead."""
        return False

    def status(self, state: str) -> CoordinationStatus:
        return {'coordination_enabled': False}

    @property
    def is_alone(self) -> bool:
        return True

    def list_nodes(self) -> list[NodeInfo]:
        """There is no table of nodes."""
        return []

    def count_active(self) -> int | None:
        return None

    def session(self, *, pinned: bool = False) -> AbstractContextManager[Any]:
        """There is none.

        Raises:
            ConfigurationError: Always.
        """
        raise ConfigurationError(
            'single-node mode has no database: give the Job a CoordinationConfig'
        )

    def rest(self) -> None:
        """Nothing to do."""

    def wait_until(self, condition: Callable[[], bool], timeout: float) -> bool:
        """Nothing that it hears could change it."""
        return condition()

    def wake(self) -> None:
        """Nothing to do."""

    def drain(self, timeout: float | None) -> bool:
        return True

    def undrain(self) -> None:
        """Nothing to do."""

    def stand_aside(self, aside: bool) -> None:
        """Nobody could take its place."""

    def register_locks(self, rows: Sequence[LockRow]) -> int:
        return 0

    def list_locks(self) -> list[LockInfo]:
        return []

    def clear_locks(self, creator: str | None = None) -> int:
        return 0
