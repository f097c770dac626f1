"""The ledger of single-node mode."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from ..errors import ConfigurationError
from .execution import Execution, check_key
from .interface import Ledger, Unsettled

if TYPE_CHECKING:
    from psycopg2.extensions import connection as PgConnection

    from ..store.executions import Steps

__all__ = ['SingleLedger']


class SingleLedger:
    """The ledger of single-node mode: every key runs, nothing is remembered, no database is
    needed.
    """

    def begin_for(self, mine: Unsettled) -> None:
        """Begin an attempt; see `begin`."""
        mine.execution = self.begin(mine.key, mine.retention_sec)

    def settle(self, mine: Unsettled) -> None:
        """Record the end of an attempt; see `finish` and `fail`."""
        mine.settled = True
        if mine.execution is None:
            return
        if mine.succeeded:
            self.finish(mine.execution)
        elif mine.failure is not None:
            self.fail(mine.execution, mine.failure)

    def leave(self, mine: Unsettled) -> None:
        """Let go of an attempt whose end was not recorded."""
        if mine.execution is not None and not mine.settled and not mine.busy:
            mine.settled = True
            self.abandon(mine.execution)

    def begin(self, key: str, retention_sec: float) -> Execution:
        """Always an attempt."""
        return Execution(self, check_key(key), 0, 1, retention_sec)

    def finish(self, execution: Execution) -> None:
        """Mark the attempt as completed."""
        execution._completed = True

    def fail(self, execution: Execution, error: BaseException) -> None:
        """Nothing to record."""

    def abandon(self, execution: Execution) -> None:
        """Nothing to record."""

    def release(self, pid: int) -> int:
        """Nothing to release."""
        return 0

    def for_messages(self) -> Ledger:
        """Itself."""
        return self

    def close(self) -> None:
        """Nothing to close."""

    def transaction_of(self, execution: Execution) -> AbstractContextManager[PgConnection]:
        """There is none."""
        raise ConfigurationError(
            'execution.transaction() needs a database: single-node mode has none; give the Job a '
            'CoordinationConfig'
        )

    def steps_of(self, execution: Execution) -> Steps | None:
        """Nothing is recorded."""
        return None

    def outcome_of(self, execution: Execution) -> tuple[str, Any] | None:
        """Nothing is recorded."""
        return None

    @property
    def unsettled(self) -> int:
        """Nothing waits to be recorded."""
        return 0
