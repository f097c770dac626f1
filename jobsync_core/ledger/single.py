"""The ledger of single-node mode."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from ..errors import ConfigurationError
from .interface import Ledger
from .limits import check_key
from .state import Unsettled

if TYPE_CHECKING:
    from psycopg2.extensions import connection as PgConnection

    from ..store.completions import Steps

__all__ = ['SingleLedger']


class SingleLedger:
    """The ledger of single-node mode: every key runs, nothing is remembered, no database is
    needed.
    """

    def begin(self, mine: Unsettled) -> None:
        """Always an attempt."""
        check_key(mine.key)
        mine.begin(0, 1)

    def settle(self, mine: Unsettled) -> None:
        """Mark the attempt as completed; nothing to record."""
        mine.settled = True
        if mine.succeeded:
            mine.complete(mine.encoded)

    def leave(self, mine: Unsettled) -> None:
        """Nothing to record."""

    def release(self, pid: int) -> int:
        """Nothing to release."""
        return 0

    def keep(self, key: str, message: str) -> bool:
        """No key is dead here."""
        return False

    def for_messages(self) -> Ledger:
        """Itself."""
        return self

    def close(self) -> None:
        """Nothing to close."""

    def transaction_of(self, mine: Unsettled) -> AbstractContextManager[PgConnection]:
        """There is none."""
        raise ConfigurationError(
            'execution.transaction() needs a database: single-node mode has none; give the Job a '
            'CoordinationConfig'
        )

    def steps_of(self, mine: Unsettled) -> Steps | None:
        """Nothing is recorded."""
        return None

    def outcome_of(self, mine: Unsettled) -> tuple[str, Any] | None:
        """Nothing is recorded."""
        return None

    @property
    def unsettled(self) -> int:
        """Nothing waits to be recorded."""
        return 0
