"""The exactly-once ledger: who executes a key, and that it completes once.

A key is begun by one attempt at a time. Each attempt holds a fence; only the holder of the newest one can record the
completion. What the user writes in the transaction that records it happens exactly once; everything else that an
attempt does may happen again in a later attempt, if this one dies before its completion is recorded.
"""
from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import psycopg2
import psycopg2.errors

from .errors import (
    ClaimLost,
    ConfigurationError,
    DatabaseUnavailable,
    DuplicateExecution,
    ExecutionRunning,
    Fenced,
    JobSyncError,
    StoreTimeout,
)
from .execution import DEFAULT_RETENTION, MAX_RESULT_BYTES, Execution, check_key, current_execution, describe, retention_seconds
from .ledger_calls import LedgerCalls
from .logs import get_logger
from .process import this_process
from .store import executions
from .store.executions import Completion, Holder

if TYPE_CHECKING:
    from psycopg2.extensions import connection as PgConnection

    from .messages import Process
    from .store.connection import Sessions
    from .store.schema import Tables

__all__ = [
    'DEFAULT_RETENTION', 'MAX_RESULT_BYTES', 'Execution', 'Ledger', 'check_key', 'current_execution', 'retention_seconds',
]

logger = get_logger(__name__)

# Looks for an attempt that may have been begun: the server may execute a statement after its client gave up.
_ORPHAN_TRIES = 5
_FIRST_RETRY_SEC, _LAST_RETRY_SEC = 0.2, 2.0


@dataclasses.dataclass
class _Loose:
    """An attempt whose end could not be recorded yet."""

    key: str
    holder: Holder
    fence: int | None
    retention_sec: float
    completed: bool = False
    result: str | None = None
    error: str = ''
    tries: int = 0


@dataclasses.dataclass
class _Local:
    """What one process knows: a forked child begins with nothing."""

    process: Process
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)
    held: set[str] = dataclasses.field(default_factory=set)
    loose: dict[str, _Loose] = dataclasses.field(default_factory=dict)
    thread: threading.Thread | None = None
    closing: threading.Event = dataclasses.field(default_factory=threading.Event)


class Ledger:
    """Executions of one node, recorded in the cluster's database.

    It may be inherited by forked children: each has connections of its own and is recorded as a process of its own.
    An attempt whose end cannot be recorded (the database is away, or the caller's transaction is still open) is settled by a
    background thread of its process, so that no key stays taken while its process lives.

    Args:
        sessions: Connections to the database.
        tables: Names of the tables.
        node: This node's name.
        incarnation: Gives this node's present incarnation.
        has_lease: Tells whether this node's lease is valid.
    """

    def __init__(
        self, sessions: Sessions, tables: Tables, node: str, incarnation: Callable[[], str], has_lease: Callable[[], bool] = lambda: True,
    ) -> None:
        self._sessions = sessions
        self._tables = tables
        self._calls = LedgerCalls(sessions, tables)
        self._node = node
        self._incarnation = incarnation
        self.has_lease = has_lease
        self._locals: dict[int, _Local] = {}

    @property
    def incarnation(self) -> str:
        """The present life of the node that this ledger records for."""
        return self._incarnation()

    def begin(self, key: str, retention_sec: float) -> Execution:
        """Begin an attempt.

        Args:
            key: The key, at most 2000 bytes.
            retention_sec: Seconds for which its completion is remembered.

        Raises:
            DuplicateExecution: The key was completed; `.result` is its stored result.
            ExecutionRunning: Another attempt is running.
            ClaimLost: This node was evicted; it rejoins by itself. Nothing was begun.
            DatabaseUnavailable: Nothing was begun.
        """
        check_key(key)
        here = self._here()
        with here.lock:
            if key in here.held:
                raise _running(key)
            here.held.add(key)
        begun = False
        try:
            loose = here.loose.get(key)
            if loose is not None and loose.fence is None:
                self._forget(here, loose)  # begin itself takes over what this process does not hold
            elif loose is not None and not self._settle(here, loose):
                raise _running(key)
            holder = Holder(self._node, self._incarnation(), here.process)
            fence, attempts = self._begin(here, key, holder, retention_sec)
            begun = True
        finally:
            if not begun:
                with here.lock:
                    here.held.discard(key)
        return Execution(self, key, fence, attempts, retention_sec)

    def _begin(self, here: _Local, key: str, holder: Holder, retention_sec: float) -> tuple[int, int]:
        try:
            row = self._calls.begin(key, holder)
        except psycopg2.Error:
            raise
        except BaseException:
            # The attempt may be begun and its reply lost: then nobody else could begin it while this process lives.
            self._loosen(here, _Loose(key, holder, None, retention_sec, error='begun, but the database did not answer'))
            raise
        if row.began:
            return row.fence, row.attempts
        if not row.registered:
            raise ClaimLost(
                f'node {self._node!r} is not registered in the cluster at the moment, so {key!r} was not begun; '
                'an evicted node rejoins by itself: try again')
        if row.state != 'done':
            raise _running(key)
        duplicate = DuplicateExecution(f'the key {key!r} was already completed')
        duplicate.key, duplicate.result = key, row.result
        raise duplicate

    def finish(self, execution: Execution) -> None:
        """Record that the attempt completed, unless `transaction` or `complete` did.

        Raises:
            Fenced: Another attempt has taken the key over.
            DatabaseUnavailable: The completion is not known to be recorded; the key may run again.
            JobSyncError: The transaction that `complete` wrote into was rolled back.
        """
        here = self._here()
        if execution._pid != here.process.pid:
            return
        try:
            if execution._foreign:
                self._check_committed(here, execution)
            elif not execution._completed:
                self._finish(here, execution)
            self._add_result(execution)
        finally:
            with here.lock:
                here.held.discard(execution.key)

    def _finish(self, here: _Local, execution: Execution) -> None:
        try:
            finished = self._calls.finish(Completion(execution.key, execution.fence, execution._encoded, execution.retention_sec))
        except DatabaseUnavailable as error:
            self._loosen(here, self._loose(here, execution, completed=True))
            raise type(error)(
                f'{execution.key!r} was executed, but the database could not record its completion ({error}); '
                'it is tried again in the background, and until it succeeds another attempt may run') from error
        except psycopg2.Error:
            raise
        except BaseException:  # a time limit's signal, for one, may strike here
            self._loosen(here, self._loose(here, execution, completed=True))
            raise
        if not finished:
            raise Fenced(f'another attempt has taken the key {execution.key!r} over; this one (fence {execution.fence}) is not recorded')
        execution._completed = True
        execution._recorded = execution._encoded

    def _check_committed(self, here: _Local, execution: Execution) -> None:
        error = 'the transaction that complete() wrote into was rolled back'
        state = self._end(here, execution, error)
        if state == 'failed':
            raise JobSyncError(f'{execution.key!r}: {error}; the key may run again')
        if state is None:
            raise Fenced(f'another attempt has taken the key {execution.key!r} over')

    def _add_result(self, execution: Execution) -> None:
        text = execution._encoded
        if text is None or execution._recorded == text or not execution._completed:
            return
        try:
            self._calls.add_result(execution.key, execution.fence, text)
        except (DatabaseUnavailable, psycopg2.DataError) as error:
            logger.warning('key=%s completed without its result: %s', execution.key, error)

    def fail(self, execution: Execution, error: BaseException) -> None:
        """Record that the attempt failed, so that anybody may begin the next one at once. Raises nothing: `error` goes on."""
        here = self._here()
        if execution._pid != here.process.pid:
            return
        try:
            self._end(here, execution, describe(error))
        except DatabaseUnavailable as trouble:
            logger.warning('key=%s failed, which could not be recorded yet: %s', execution.key, trouble)
        except psycopg2.Error:
            logger.exception('key=%s failed, which could not be recorded', execution.key)
        finally:
            with here.lock:
                here.held.discard(execution.key)

    def _end(self, here: _Local, execution: Execution, error: str) -> str | None:
        loose = self._loose(here, execution, error=error)
        try:
            state = self._calls.settle(execution.key, execution.fence, error, execution.retention_sec)
        except DatabaseUnavailable:
            self._loosen(here, loose)
            raise
        if state == 'running':
            self._loosen(here, loose)
        return state

    def abandon(self, execution: Execution) -> None:
        """Let go of an attempt that will not run, without waiting for the database."""
        here = self._here()
        if execution._pid == here.process.pid:
            self._loosen(here, self._loose(here, execution, error='abandoned'))
            with here.lock:
                here.held.discard(execution.key)

    def release(self, pid: int) -> int:
        """Let others take over what a lost child of this node was executing; returns how many keys.

        Args:
            pid: The child's process id; the caller knows that it is dead.

        Raises:
            DatabaseUnavailable: Nothing is known to be released; call it again.
        """
        return self._calls.release(self._node, self._incarnation(), pid, 'its process was lost', DEFAULT_RETENTION.total_seconds())

    def close(self) -> None:
        """Try once more to record what could not be recorded, then stop trying."""
        here = self._here()
        here.closing.set()
        try:
            self._settle_all(here)
        except DatabaseUnavailable as error:
            logger.warning('%d executions end unrecorded; they may run again when this node is gone: %s', len(here.loose), error)

    # --- inside ---

    def _here(self) -> _Local:
        pid = os.getpid()
        here = self._locals.get(pid)
        return here if here is not None else self._locals.setdefault(pid, _Local(this_process()))

    def _loose(self, here: _Local, execution: Execution, *, completed: bool = False, error: str = '') -> _Loose:
        holder = Holder(self._node, self._incarnation(), here.process)
        return _Loose(execution.key, holder, execution.fence, execution.retention_sec, completed, execution._encoded, error)

    def _loosen(self, here: _Local, loose: _Loose) -> None:
        with here.lock:
            here.loose[loose.key] = loose
            if here.thread is None and not here.closing.is_set():
                here.thread = threading.Thread(target=self._tend, args=(here,), name='jobsync ledger', daemon=True)
                here.thread.start()

    def _tend(self, here: _Local) -> None:
        delay = _FIRST_RETRY_SEC
        while not here.closing.wait(delay):
            try:
                self._settle_all(here)
            except DatabaseUnavailable as error:
                logger.debug('executions=%d still unrecorded: %s', len(here.loose), error)
            with here.lock:
                if not here.loose:
                    here.thread = None
                    return
            delay = min(2 * delay, _LAST_RETRY_SEC)

    def _settle_all(self, here: _Local) -> None:
        for loose in list(here.loose.values()):
            with here.lock:
                if loose.key in here.held or here.loose.get(loose.key) is not loose:
                    continue
                here.held.add(loose.key)  # so that the key does not begin here while its last attempt ends
            try:
                self._settle(here, loose)
            except psycopg2.Error:
                logger.exception('key=%s cannot be settled', loose.key)
                self._forget(here, loose)
            finally:
                with here.lock:
                    here.held.discard(loose.key)

    def _settle(self, here: _Local, loose: _Loose) -> bool:
        """Record the end of an attempt; False while the caller's transaction is still open."""
        if loose.fence is None:
            process = loose.holder.process
            released = self._calls.release(
                loose.holder.node, loose.holder.incarnation, process.pid, loose.error, loose.retention_sec, loose.key)
            loose.tries += 1
            if not released and loose.tries < _ORPHAN_TRIES:
                return False
        elif loose.completed:
            finished = self._calls.finish(Completion(loose.key, loose.fence, loose.result, loose.retention_sec))
            logger.info('key=%s recorded=%s after the database had been away', loose.key, finished)
        else:
            if self._calls.settle(loose.key, loose.fence, loose.error, loose.retention_sec) == 'running':
                return False
        self._forget(here, loose)
        return True

    @staticmethod
    def _forget(here: _Local, loose: _Loose) -> None:
        with here.lock:
            if here.loose.get(loose.key) is loose:
                del here.loose[loose.key]

    @contextmanager
    def transaction_of(self, execution: Execution) -> Iterator[PgConnection]:
        """What `Execution.transaction` gives."""
        if execution._completed:
            raise ConfigurationError(f'{execution.key!r} is completed already: use one transaction() for all of its writes')
        with self._sessions.session(limited=False, users=True) as connection:
            marker = f'{execution.fence} {execution.key}'
            try:
                executions.mark(connection, marker)
            except psycopg2.errors.QueryCanceled as error:  # still under the limit of our own statements, which it lifts
                raise StoreTimeout(f'the transaction of {execution.key!r} could not be begun in time: {str(error).strip()}') from error
            yield connection
            encoded = execution._encoded
            completion = Completion(execution.key, execution.fence, encoded, execution.retention_sec)
            if not executions.finish(connection, self._tables, completion, marker):
                if not executions.is_marked(connection, marker):
                    raise JobSyncError(
                        f'{execution.key!r}: the block of execution.transaction() committed or rolled back by itself, so its writes '
                        'are not those of the completion: leave that to the end of the block')
                raise Fenced(f'another attempt has taken the key {execution.key!r} over; the transaction is rolled back')
        execution._completed = True
        execution._recorded = encoded

    def completion_of(self, execution: Execution) -> tuple[str, tuple[object, ...]] | None:
        """The statement of `Execution.complete` and its parameters."""
        completion = Completion(execution.key, execution.fence, execution._encoded, execution.retention_sec)
        return executions.finish_sql(self._tables), executions.finish_parameters(completion)


def _running(key: str) -> ExecutionRunning:
    running = ExecutionRunning(f'the key {key!r} is being executed right now; try again later')
    running.key = key
    return running
