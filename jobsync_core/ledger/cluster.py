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
    ClaimLost,
    DatabaseRefused,
    DatabaseUnavailable,
    DuplicateExecution,
    ExecutionRunning,
    Fenced,
    NotCommitted,
)
from ..logs import Repeats, get_logger
from ..process import this_process
from ..protocol.pausing import Pausing
from ..store import executions
from ..store.executions import Holder, Steps
from ..store.transactions import Transactions
from .attempt import Attempt
from .calls import LedgerCalls
from .execution import (
    DEFAULT_RETENTION,
    MAX_RESULT_BYTES,
    Execution,
    check_key,
    completion_of,
    current_execution,
    describe,
    retention_seconds,
)
from .interface import Ledger, Unsettled
from .results import decode_result
from .single import SingleLedger
from .transaction import CompletingTransaction
from .unsettled import Settling

if TYPE_CHECKING:
    from psycopg2.extensions import connection as PgConnection

    from ..process import Process
    from ..store.connection import Sessions
    from ..store.tables import Tables
    from .keys import Former

__all__ = [
    'DEFAULT_RETENTION',
    'MAX_RESULT_BYTES',
    'UNCOORDINATED',
    'ClusterLedger',
    'Execution',
    'check_key',
    'current_execution',
    'retention_seconds',
]

logger = get_logger(__name__)

#: Stands for the incarnation in a worker that runs without coordination because it may.
UNCOORDINATED = 'uncoordinated'

#: Seconds until it is looked again whether there are keys under a prefix of an earlier version.
_PREFIX_SEC = 60.0


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
    """

    def __init__(
        self,
        sessions: Sessions,
        tables: Tables,
        node: str,
        incarnation: Callable[[], str],
        has_lease: Callable[[], bool] = lambda: True,
        pausing: Pausing | None = None,
    ) -> None:
        self._sessions = sessions
        self._tables = tables
        self._calls = LedgerCalls(sessions, tables)
        self._transactions = Transactions(sessions)
        self._node = node
        self._incarnation = incarnation
        self.has_lease = has_lease
        self.pausing = pausing if pausing is not None else Pausing()
        self._locals: dict[int, _Local] = {}
        self._prefixes: dict[str, tuple[float, bool]] = {}
        self._repeats = Repeats()

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

    # --- what an attempt asks ---

    def begin_for(self, mine: Unsettled) -> None:
        """Begin an attempt; see Ledger."""
        key = check_key(mine.key)
        here = self._here()
        settling = here.settling
        settling.start()
        settling.check_room()
        if settling.running.setdefault(key, mine) is not mine:
            raise _running(key)
        last = settling.find(key)
        if last is not None:
            if last.busy or not self._record_end(last):
                raise _running(key)
            settling.forget(last)
        if mine.former:
            try:
                self._check_former(key, mine.former)
            except DatabaseRefused as error:
                self._note_refusal(error)
                raise
        mine.holder = holder = Holder(self._node, self._incarnation(), here.process)
        mine.sent = True
        try:
            row = self._calls.begin(key, holder)
        except DatabaseUnavailable as error:
            mine.sent = error.sent
            self._note_refusal(error)
            raise
        self.pausing.answered()
        if row.began:
            mine.execution = Execution(self, key, row.fence, row.attempts, mine.retention_sec)
            return
        mine.sent = False
        if not row.registered:
            raise ClaimLost(
                f'node {self._node!r} is not registered in the cluster at the moment, so {key!r} '
                'was not begun; '
                'an evicted node rejoins by itself: try again'
            )
        if row.state != 'done':
            raise _running(key)
        duplicate = DuplicateExecution(f'the key {key!r} was already completed')
        duplicate.key, duplicate.result = key, decode_result(row.result)
        raise duplicate

    def settle(self, mine: Unsettled) -> None:
        """Record the end of an attempt; see Ledger."""
        if mine.pid == os.getpid():
            self._finish(mine) if mine.succeeded else self._fail(mine)

    def leave(self, mine: Unsettled) -> None:
        """Leave what is not recorded of an attempt to the background; see Ledger."""
        here = self._locals.get(mine.pid)
        if here is not None and mine.pid == os.getpid():
            here.settling.leave(mine)

    # --- the same by hand ---

    def begin(self, key: str, retention_sec: float) -> Execution:
        """Begin an attempt; the caller ends it by `finish`, `fail` or `abandon`.

        Args:
            key: The key, at most 2000 bytes.
            retention_sec: Seconds for which its completion is remembered.

        Raises:
            DuplicateExecution: The key was completed; `.result` is its stored result.
            ExecutionRunning: Another attempt is running.
            ClaimLost: This node was evicted; it rejoins by itself. Nothing was begun.
            DatabaseUnavailable: Nothing was begun. DatabaseRefused, which is one, tells why the
                server refused.
        """
        attempt = Attempt(self, key, retention_sec)
        try:
            attempt.begin()
        except BaseException:
            attempt.leave()
            raise
        return attempt.hand_over()

    def finish(self, execution: Execution) -> None:
        """Record that the attempt completed, unless `transaction` or `complete` did.

        Raises:
            Fenced: Another attempt has taken the key over.
            DatabaseUnavailable: The completion is not known to be recorded; it is recorded later,
                and until then the key may run again.
            NotCommitted: The transaction that `complete` wrote into was rolled back, or is still
                open.
        """
        mine = self._unsettled_of(execution)
        mine.succeeded = True
        self._end(mine, self._finish)

    def fail(self, execution: Execution, error: BaseException) -> None:
        """Record that the attempt failed, so that anybody may begin the next one at once. Raises
        nothing: `error` goes on.
        """
        mine = self._unsettled_of(execution)
        mine.error = describe(error)
        self._end(mine, self._fail)

    def abandon(self, execution: Execution) -> None:
        """Let go of an attempt that will not run, without waiting for the database."""
        mine = self._unsettled_of(execution)
        mine.error = 'abandoned'
        self._end(mine, lambda unsettled: None)

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

    def for_messages(self) -> Ledger:
        """Itself, where something may begin; see Ledger."""
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

    # --- inside ---

    def _note_refusal(self, error: DatabaseUnavailable) -> None:
        if isinstance(error, DatabaseRefused) and error.pause:
            self.pausing.refused(error, clock.now())

    def _check_former(self, key: str, former: tuple[Former, ...]) -> None:
        """Look for the key under the names that it had before: what is complete stays complete.

        Nothing is asked for again within a minute under a prefix that no key has any more.
        """
        now = clock.now()
        wanted = []
        for each in former:
            known = self._prefixes.get(each.prefix)
            if each.prefix and (known is None or now - known[0] > _PREFIX_SEC):
                known = self._prefixes[each.prefix] = now, self._calls.has_prefix(each.prefix)
            if not each.prefix or (known is not None and known[1]):
                wanted.append(each)
        row = (
            self._calls.find(
                [each.key for each in wanted], [each.key for each in wanted if each.ambiguous]
            )
            if wanted
            else None
        )
        if row is None:
            return
        state, result = row
        if state != 'done':
            raise _running(key)
        duplicate = DuplicateExecution(f'the key {key!r} was already completed')
        duplicate.key, duplicate.result = key, decode_result(result)
        raise duplicate

    def _here(self) -> _Local:
        pid = os.getpid()
        here = self._locals.get(pid)
        if here is not None:
            return here
        settling = Settling(
            self._record_end, self._release_unknown, 4 * self._sessions.longest_call_sec
        )
        return self._locals.setdefault(pid, _Local(this_process(), settling))

    def _unsettled_of(self, execution: Execution) -> Unsettled:
        found = self._here().settling.running.get(execution.key)
        if isinstance(found, Unsettled) and found.execution is execution:
            return found
        return Unsettled(
            execution.key,
            execution.retention_sec,
            pid=execution._pid,
            sent=True,
            execution=execution,
        )

    def _end(self, mine: Unsettled, action: Callable[[Unsettled], None]) -> None:
        if mine.pid != os.getpid():
            return
        try:
            action(mine)
        finally:
            self._here().settling.leave(mine)

    def _finish(self, mine: Unsettled) -> None:
        execution = mine.execution
        if execution is None:
            return
        if execution._foreign:
            self._check_committed(mine, execution)
        elif not execution._completed:
            self._record_completion(mine, execution)
        self._add_result(execution)
        mine.settled = True

    def _record_completion(self, mine: Unsettled, execution: Execution) -> None:
        try:
            finished = self._calls.finish(completion_of(execution))
        except DatabaseUnavailable as error:
            said = (
                f'{execution.key!r} was executed, but the database could not record its '
                f'completion ({error}); '
                'it is tried again in the background, and until it succeeds another attempt may run'
            )
            if isinstance(error, DatabaseRefused):
                raise DatabaseRefused(said, error.sqlstate, error.pause) from error
            raise type(error)(said) from error
        if not finished:
            mine.settled = True
            raise Fenced(
                f'another attempt has taken the key {execution.key!r} over; this one (fence '
                f'{execution.fence}) is not recorded'
            )
        execution._completed = True
        execution._recorded = execution._encoded

    def _check_committed(self, mine: Unsettled, execution: Execution) -> None:
        mine.error = 'the transaction that complete() wrote into was rolled back'
        state = self._calls.settle(
            execution.key, execution.fence, mine.error, execution.retention_sec
        )
        mine.settled = state != 'running'
        if state == 'running':
            raise NotCommitted(
                f'{execution.key!r}: the transaction that complete() wrote into is still open, '
                'and may be rolled back yet: commit it '
                'before the function returns, or put @exactly_once around what commits'
            )
        if state == 'failed':
            raise NotCommitted(f'{execution.key!r}: {mine.error}; the key may run again')
        if state is None:
            raise Fenced(f'another attempt has taken the key {execution.key!r} over')

    def _add_result(self, execution: Execution) -> None:
        text = execution._encoded
        if text is None or execution._recorded == text or not execution._completed:
            return
        try:
            self._calls.add_result(execution.key, execution.fence, text)
        except DatabaseUnavailable as error:
            self._say('key=%s completed without its result: %s%s', execution.key, error)

    def _fail(self, mine: Unsettled) -> None:
        execution = mine.execution
        if execution is None:
            return
        try:
            mine.settled = (
                self._calls.settle(
                    execution.key, execution.fence, mine.error, execution.retention_sec
                )
                != 'running'
            )
        except DatabaseUnavailable as trouble:
            self._say(
                'key=%s failed, which could not be recorded yet: %s%s', execution.key, trouble
            )

    def _say(self, line: str, key: str, error: Exception) -> None:
        """An outage concerns all keys: it is told once, then once a minute with the number of those
        between.
        """
        more = self._repeats.say(line, clock.now())
        if more is not None:
            logger.warning(line, key, error, more)

    def _record_end(self, unsettled: Unsettled) -> bool:
        """Record the end of an attempt in the background; False while a transaction that may
        complete it is open.
        """
        execution = unsettled.execution
        if execution is None:
            return True
        if unsettled.succeeded and not execution._foreign and not execution._completed:
            finished = self._calls.finish(completion_of(execution))
            more = self._repeats.say('recorded', clock.now())
            if more is not None:
                logger.info(
                    'key=%s recorded=%s after the database had been away%s',
                    execution.key,
                    finished,
                    more,
                )
            return True
        return (
            self._calls.settle(
                execution.key, execution.fence, unsettled.error, execution.retention_sec
            )
            != 'running'
        )

    def _release_unknown(self, unsettled: Unsettled) -> None:
        holder = unsettled.holder
        if holder is not None:
            self._calls.release(
                holder.node,
                holder.incarnation,
                holder.process.pid,
                'begun, but the database did not answer',
                unsettled.retention_sec,
                unsettled.key,
            )

    # --- what an execution asks ---

    def transaction_of(self, execution: Execution) -> AbstractContextManager[PgConnection]:
        """What `Execution.transaction` gives."""
        return CompletingTransaction(self._transactions, self._tables, self.outcome_of, execution)

    def steps_of(self, execution: Execution) -> Steps:
        """The statements of `Execution.complete`."""
        return executions.steps(self._tables, completion_of(execution), self._sessions.place)

    def outcome_of(self, execution: Execution) -> tuple[str, Any] | None:
        """State and result of the execution as everybody sees them; None where another attempt
        holds the key.
        """
        found = self._calls.stored(execution.key, execution.fence)
        return (found[0], decode_result(found[1])) if found is not None else None


def _running(key: str) -> ExecutionRunning:
    running = ExecutionRunning(f'the key {key!r} is being executed right now; try again later')
    running.key = key
    return running
