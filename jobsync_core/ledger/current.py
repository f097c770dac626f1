"""Which ledger a call uses: that of the Job around it, or one that remembers nothing."""
from __future__ import annotations

from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from .. import clock
from ..errors import ClaimLost, ConfigurationError, NotEntered
from .cluster import Ledger
from .execution import Execution, check_key

if TYPE_CHECKING:
    from psycopg2.extensions import connection as PgConnection

    from ..store.executions import Steps
    from .attempt import Attempt

__all__ = [
    'UNCOORDINATED', 'LocalLedger', 'current_ledger', 'enter_ledger', 'leave_ledger', 'message_ledger', 'set_current_ledger',
]

#: Stands for the incarnation in a worker that runs without coordination because it may.
UNCOORDINATED = 'uncoordinated'


class LocalLedger:
    """The ledger of single-node mode: every key runs, nothing is remembered, no database is needed."""

    def begin_for(self, attempt: Attempt) -> None:
        """Begin an attempt; see `begin`."""
        attempt.unsettled.execution = self.begin(attempt.key, attempt.retention_sec)

    def settle(self, attempt: Attempt) -> None:
        """Record the end of an attempt; see `finish` and `fail`."""
        mine = attempt.unsettled
        mine.settled = True
        if mine.succeeded:
            self.finish(attempt.execution)
        elif attempt.failure is not None:
            self.fail(attempt.execution, attempt.failure)

    def leave(self, attempt: Attempt) -> None:
        """Let go of an attempt whose end was not recorded."""
        mine = attempt.unsettled
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

    def close(self) -> None:
        """Nothing to close."""

    def transaction_of(self, execution: Execution) -> AbstractContextManager[PgConnection]:
        """There is none."""
        raise ConfigurationError('execution.transaction() needs a database: single-node mode has none; give the Job a CoordinationConfig')

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


_uncoordinated = LocalLedger()

# The ledgers of the Jobs that this process is in, in the order in which they were entered. Each step is one operation of the
# dictionary: without a lock, which a child that is forked at that moment would find taken for ever.
_entered: dict[int, Ledger | LocalLedger] = {}
# Those that were entered in this context: threads that are in a Job each use their own.
_here: ContextVar[tuple[Ledger | LocalLedger, ...]] = ContextVar('jobsync_ledgers', default=())


def enter_ledger(ledger: Ledger | LocalLedger) -> None:
    """Make it the ledger of this context until `leave_ledger`; and of threads that have entered none, and of children forked meanwhile."""
    _entered.pop(id(ledger), None)
    _entered[id(ledger)] = ledger
    _here.set((*(other for other in _here.get() if other is not ledger and id(other) in _entered), ledger))


def leave_ledger(ledger: Ledger | LocalLedger) -> None:
    """Use it no more; the Job around it, or another that is entered, goes on."""
    _entered.pop(id(ledger), None)


def set_current_ledger(ledger: Ledger | LocalLedger | None) -> None:
    """Make `ledger` the only one of this process, and of the children that it forks from now on; None: it has none."""
    _entered.clear()
    if ledger is not None:
        enter_ledger(ledger)


def current_ledger() -> Ledger | LocalLedger:
    """The ledger of the Job that was entered last in this context, or else in this process, and is not left yet.

    Raises:
        NotEntered: This process has entered no Job.
    """
    for ledger in reversed(_here.get()):
        if id(ledger) in _entered:
            return ledger
    entered = list(_entered.values())
    if not entered:
        raise NotEntered(
            'this process has entered no Job, so it cannot tell what was executed before: call this inside `with Job(...)`, '
            'or inside `with Job(name)` for single-node mode, where everything just runs')
    return entered[-1]


def message_ledger() -> Ledger | LocalLedger:
    """The ledger for a message that an adapter's worker is about to process.

    Raises:
        NotEntered: This process has entered no Job.
        ClaimLost: The node's lease ran out. The database is most likely out of reach, and to ask it would take seconds for
            each message that had been handed to the pool before.
        DatabaseRefused: The database refuses to begin anything, and is not asked before the pause is over.
    """
    ledger = current_ledger()
    if not isinstance(ledger, Ledger):
        return ledger
    if ledger.incarnation == UNCOORDINATED:
        return _uncoordinated
    if not ledger.has_lease():
        raise ClaimLost('the lease of this node ran out, so that nothing may begin here at the moment')
    if ledger.pausing.is_paused(clock.now()):
        raise ledger.pausing.error
    return ledger
