"""Single-node mode: one process that owns everything, without a cluster and without a database."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from ..assignment.hashing import check_task_id
from ..assignment.tokens import TokenSet
from ..errors import ConfigurationError
from ..ledger.single import SingleLedger
from ..protocol.pausing import Pausing
from ..results import AuditedTask, CoordinationStatus, Explanation, LockInfo, NodeInfo
from ..task import task_id_of

__all__ = ['SingleNode']


class SingleNode:
    """Every task is its own, and nothing is remembered; see Node.

    Args:
        name: Its name.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._is_entered = False
        self.ledger = SingleLedger()
        self.pausing = Pausing()

    # --- entering and leaving ---

    def enter(self, provide: Callable[[], object], is_worker: bool) -> None:
        """See Node. There are no locks."""
        self._is_entered = True

    def entered(self, is_bound: Callable[[], bool]) -> None:
        """See Node. Tokens never change."""

    def leave(self, error: BaseException | None) -> None:
        """See Node."""
        self._is_entered = False
        self.ledger.close()

    def leave_child(self, error: BaseException | None) -> None:
        """See Node."""

    def give_up(self) -> None:
        """See Node. Entering does not wait."""

    def disown(self, mark: str) -> None:
        """See Node."""

    # --- tasks ---

    def can_claim(self, task: object) -> bool:
        """See Node."""
        if not self._is_entered:
            return False
        check_task_id(task_id_of(task))
        return True

    def owns(self, task_id: object) -> bool:
        """See Node."""
        return True

    def add(self, task: object) -> None:
        """See Node."""
        check_task_id(task_id_of(task))

    def record(self, batch: Sequence[object]) -> None:
        """See Node."""

    def audit(self) -> None:
        """See Node."""

    def get_audit(self) -> list[AuditedTask]:
        """See Node."""
        return []

    def token_of(self, task_id: object) -> int:
        """See Node."""
        return 0

    def owner_of(self, task_id: object) -> str | None:
        """See Node."""
        return self._name

    def explain(self, task_id: object) -> Explanation:
        """See Node."""
        return {'task_id': check_task_id(task_id_of(task_id)), 'token': 0, 'owner': self._name}

    # --- what it knows ---

    @property
    def tokens(self) -> TokenSet:
        """See Node: there are no tokens."""
        return TokenSet()

    @property
    def version(self) -> int:
        """See Node."""
        return 0

    @property
    def incarnation(self) -> str:
        """See Node."""
        return ''

    @property
    def has_lease(self) -> bool:
        """See Node."""
        return True

    @property
    def is_healthy(self) -> bool:
        """See Node."""
        return True

    @property
    def is_running(self) -> bool:
        """See Node."""
        return True

    @property
    def leads(self) -> bool:
        """See Node: there is nobody to lead."""
        return False

    def status(self, state: str) -> CoordinationStatus:
        """See Node."""
        return {'coordination_enabled': False}

    @property
    def is_alone(self) -> bool:
        """See Node."""
        return True

    def list_nodes(self) -> list[NodeInfo]:
        """See Node: there is no table of nodes."""
        return []

    def count_active(self) -> int | None:
        """See Node."""
        return None

    # --- for adapters ---

    def session(self, *, pinned: bool = False) -> AbstractContextManager[Any]:
        """See Node.

        Raises:
            ConfigurationError: Always.
        """
        raise ConfigurationError(
            'single-node mode has no database: give the Job a CoordinationConfig'
        )

    def rest(self) -> None:
        """See Node."""

    def wait_until(self, condition: Callable[[], bool], timeout: float) -> bool:
        """See Node: nothing that it hears could change it."""
        return condition()

    def wake(self) -> None:
        """See Node."""

    # --- drain and locks ---

    def drain(self, timeout: float | None) -> bool:
        """See Node."""
        return True

    def undrain(self) -> None:
        """See Node."""

    def register_locks(
        self, rows: Sequence[tuple[str, tuple[str, ...], str | None, float | None]]
    ) -> int:
        """See Node."""
        return 0

    def list_locks(self) -> list[LockInfo]:
        """See Node."""
        return []

    def clear_locks(self, creator: str | None = None) -> int:
        """See Node."""
        return 0
