"""The exactly-once ledger: who executes a key, and that it completes once.

A key is begun by one attempt at a time. Each attempt holds a fence; only the holder of the newest
one can record the completion. What the user writes in the transaction that records it happens
exactly once; everything else that an attempt does may happen again in a later attempt, if this one
dies before its completion is recorded.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from .. import clock
from ..errors import (
    AttemptsExhausted,
    ClaimLost,
    DatabaseRefused,
    DatabaseUnavailable,
    DuplicateExecution,
    ExecutionRunning,
)
from ..process import this_process
from ..protocol.pausing import Pausing
from ..store.completions import LOST, PENDING, Steps, steps
from ..store.executions import Holder
from ..store.transactions import Transactions
from .calls import LedgerCalls
from .endings import Endings
from .former_keys import FormerKeys
from .interface import Ledger
from .limits import DEFAULT_RETENTION, check_key
from .results import lost_result, read_result
from .single import SingleLedger
from .state import Unsettled
from .transaction import CompletingTransaction
from .unsettled import Settling

if TYPE_CHECKING:
    from psycopg2.extensions import connection as PgConnection

    from ..process import Process
    from ..store.sessions import Sessions
    from ..store.tables import Tables

__all__ = ['UNCOORDINATED', 'ClusterLedger']

#: Stands for the incarnation in a worker that runs without coordination because it may.
UNCOORDINATED = 'uncoordinated'


@dataclasses.dataclass(eq=False)
class _Local:
    """What one process knows: a forked child begins with nothing."""

    process: Process
    settling: Settling


class ClusterLedger:
    """Executions of one node, recorded in the cluster's database.

    It may be inherited by forked children: each has connections of its own and is recorded as a
    process of its own. An attempt whose end cannot be recorded (the database is away, or the
    caller's transaction is still open) is settled by a background thread of its process, so that no
    key stays taken while its process lives.

    Args:
        sessions: Connections to the database.
        tables: Names of the tables.
        node: This node's name.
        incarnation: Gives this node's present incarnation.
        has_lease: Tells whether this node's lease is valid.
        pausing: Learns how the database answers begins.
        max_lost: How many attempts at a key may be lost, where a caller says nothing; 0: any
            number.
    """

    def __init__(
        self,
        sessions: Sessions,
        tables: Tables,
        node: str,
        incarnation: Callable[[], str],
        has_lease: Callable[[], bool] = lambda: True,
        pausing: Pausing | None = None,
        max_lost: int = 0,
    ) -> None:
        self._sessions = sessions
        self._tables = tables
        self._calls = LedgerCalls(sessions, tables)
        self._transactions = Transactions(sessions, tables)
        self._node = node
        self._incarnation = incarnation
        self.has_lease = has_lease
        self.pausing = pausing if pausing is not None else Pausing()
        self.max_lost = max_lost
        self._locals: dict[int, _Local] = {}
        self._former = FormerKeys(self._calls)
        self._endings = Endings(self._calls)

    @property
    def incarnation(self) -> str:
        """The present life of the node that this ledger records for."""
        return self._incarnation()

    @property
    def unsettled(self) -> int:
        """How many attempts of this process wait in the background for the database to record their
        end.
        """
        here = self._locals.get(os.getpid())
        return len(here.settling) if here is not None else 0

    def begin(self, mine: Unsettled) -> None:
        """Begin an attempt.

        Raises:
            JobSyncError: What `Ledger.begin` raises.
        """
        key = check_key(mine.key)
        here = self._here()
        settling = here.settling
        settling.start()
        settling.check_room()
        if settling.running.setdefault(key, mine) is not mine:
            raise _running(key)
        last = settling.find(key)
        if last is not None:
            if last.busy or not self._endings.record(last):
                raise _running(key)
            settling.forget(last)
        if mine.former:
            self._check_former(mine)
        mine.holder = holder = Holder(self._node, self._incarnation(), here.process)
        mine.sent = True
        try:
            limit = self.max_lost if mine.max_lost is None else mine.max_lost
            row = self._calls.begin(key, holder, limit or None)
        except DatabaseUnavailable as error:
            mine.sent = error.sent
            self._note_refusal(error)
            raise
        self.pausing.answered()
        if row.began:
            mine.begin(row.fence, row.attempts)
            return
        mine.sent = False
        if row.dead:
            raise _dead(key, row.lost)
        if not row.registered:
            raise ClaimLost(
                f'node {self._node!r} is not registered in the cluster at the moment, so {key!r} '
                'was not begun; '
                'an evicted node rejoins by itself: try again'
            )
        raise _not_begun(key, row.state, row.result)

    def settle(self, mine: Unsettled) -> None:
        """Record the end of an attempt; of one that a parent of this process began, nothing.

        Raises:
            JobSyncError: What `Ledger.settle` raises.
        """
        if not mine.began or mine.pid != os.getpid():
            return
        if mine.succeeded:
            self._endings.finish(mine)
        else:
            self._endings.fail(mine)

    def leave(self, mine: Unsettled) -> None:
        """Leave what is not recorded of an attempt to the background. Without a lock or I/O, for
        finalizers; any number of times.
        """
        here = self._locals.get(mine.pid)
        if here is not None and mine.pid == os.getpid():
            here.settling.leave(mine)

    def release(self, pid: int) -> int:
        """Let others take over what a lost child of this node was executing; returns how many keys.

        Args:
            pid: The child's process id; the caller knows that it is dead.

        Raises:
            DatabaseUnavailable: Nothing is known to be released; call it again.
        """
        return self._calls.release(
            self._node,
            self._incarnation(),
            pid,
            'its process was lost',
            DEFAULT_RETENTION.total_seconds(),
        )

    def keep(self, key: str, message: str) -> bool:
        """Keep the message of a dead key, as JSON text, unless one is kept; False where the key is
        not dead any more.
        """
        return self._calls.keep(key, message)

    def for_messages(self) -> Ledger:
        """Itself, where something may begin.

        Raises:
            ClaimLost: The node's lease ran out.
            DatabaseRefused: The database refuses to begin anything, and is not asked before the
                pause is over.
        """
        if self.incarnation == UNCOORDINATED:
            return SingleLedger()
        if not self.has_lease():
            raise ClaimLost(
                'the lease of this node ran out, so that nothing may begin here at the moment'
            )
        if self.pausing.is_paused(clock.now()):
            raise self.pausing.error
        return self

    def close(self) -> None:
        """Try once more to record what could not be recorded, then stop trying."""
        here = self._locals.get(os.getpid())
        if here is not None:
            here.settling.close()
        self._transactions.close()

    def transaction_of(self, mine: Unsettled) -> AbstractContextManager[PgConnection]:
        """What `Execution.transaction` gives."""
        return CompletingTransaction(self._transactions, self.outcome_of, mine)

    def steps_of(self, mine: Unsettled) -> Steps:
        """The statements of `Execution.complete`."""
        return steps(self._tables, mine.complete_by_transaction(), self._sessions.place)

    def outcome_of(self, mine: Unsettled) -> tuple[str, Any] | None:
        """State and result of the attempt as everybody sees them; None where another attempt holds
        the key.
        """
        found = self._calls.stored(mine.key, mine.fence)
        return (found[0], read_result(mine.key, found[1])) if found is not None else None

    def _check_former(self, mine: Unsettled) -> None:
        """What is complete under a name that the key had before stays complete."""
        try:
            found = self._former.find(mine.former)
        except DatabaseRefused as error:
            self._note_refusal(error)
            raise
        if found is not None:
            raise _not_begun(mine.key, *found)

    def _note_refusal(self, error: DatabaseUnavailable) -> None:
        if isinstance(error, DatabaseRefused) and error.pause:
            self.pausing.refused(error, clock.now())

    def _here(self) -> _Local:
        pid = os.getpid()
        here = self._locals.get(pid)
        if here is not None:
            return here
        settling = Settling(
            self._endings.record, self._endings.release, 4 * self._sessions.longest_call_sec
        )
        return self._locals.setdefault(pid, _Local(this_process(), settling))


def _not_begun(
    key: str, state: str | None, result: str | None
) -> DuplicateExecution | ExecutionRunning:
    """Why an attempt does not begin whose key has this state."""
    if state != 'done':
        return _running(key)
    if result in (PENDING, LOST):
        return lost_result(key)
    duplicate = DuplicateExecution(f'the key {key!r} was already completed')
    duplicate.key, duplicate.result = key, read_result(key, result)
    return duplicate


def _dead(key: str, lost: int) -> AttemptsExhausted:
    dead = AttemptsExhausted(
        f'the key {key!r} is dead: {lost} of its attempts were lost, as their processes died or '
        'were taken for dead; `jobsync executions show` tells which, `retry` frees the key'
    )
    dead.key, dead.lost = key, lost
    return dead


def _running(key: str) -> ExecutionRunning:
    running = ExecutionRunning(f'the key {key!r} is being executed right now; try again later')
    running.key = key
    return running
