"""A ledger in memory: keys complete once, as in the database, for as long as the test lasts."""

from __future__ import annotations

import json
import threading
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import ConfigurationError, DuplicateExecution, ExecutionRunning, Fenced
from ..ledger.execution import Execution, check_key, describe
from ..ledger.results import decode_result, encode_result
from ..ledger.single import SingleLedger

if TYPE_CHECKING:
    from psycopg2.extensions import connection as PgConnection

__all__ = ['MemoryLedger']


@dataclass
class _Row:
    state: str
    fence: int = 1
    attempts: int = 1
    result: Any = None
    error: str | None = None


class MemoryLedger(SingleLedger):
    """The exactly-once ledger of one process; threads share it, forked children do not. Retention
    never ends here: see `forget`.
    """

    def __init__(self) -> None:
        self._lock = (
            threading.RLock()
        )  # a coroutine may be collected while its own thread is in here
        self._rows: dict[str, _Row] = {}

    def begin(self, key: str, retention_sec: float) -> Execution:
        """Begin an attempt.

        Raises:
            DuplicateExecution: The key was completed; `.result` is its stored result.
            ExecutionRunning: Another attempt is running.
        """
        with self._lock:
            row = self._rows.get(check_key(key))
            if row is not None and row.state == 'done':
                duplicate = DuplicateExecution(f'the key {key!r} was already completed')
                duplicate.key, duplicate.result = key, row.result
                raise duplicate
            if row is not None and row.state == 'running':
                running = ExecutionRunning(
                    f'the key {key!r} is being executed right now; try again later'
                )
                running.key = key
                raise running
            row = self._rows[key] = (
                _Row('running', row.fence + 1, row.attempts + 1)
                if row is not None
                else _Row('running')
            )
        return Execution(self, key, row.fence, row.attempts, retention_sec)

    def finish(self, execution: Execution) -> None:
        """Complete the key.

        Raises:
            Fenced: `take_over` was called for it meanwhile.
        """
        with self._lock:
            row = self._rows.get(execution.key)
            if row is None or row.fence != execution.fence:
                raise Fenced(
                    f'another attempt has taken the key {execution.key!r} over; this one (fence '
                    f'{execution.fence}) is not recorded'
                )
            row.state = 'done'
            row.result = (
                decode_result(json.loads(execution._encoded))
                if execution._encoded is not None
                else None
            )
            execution._completed = True

    def fail(self, execution: Execution, error: BaseException) -> None:
        """The next attempt may begin."""
        self._fail(execution, describe(error))

    def abandon(self, execution: Execution) -> None:
        """The next attempt may begin."""
        self._fail(execution, 'abandoned')

    def _fail(self, execution: Execution, error: str) -> None:
        with self._lock:
            row = self._rows.get(execution.key)
            if row is not None and row.fence == execution.fence:
                row.state, row.error = 'failed', error

    def transaction_of(self, execution: Execution) -> AbstractContextManager[PgConnection]:
        """There is none."""
        raise ConfigurationError(
            'execution.transaction() needs a database, and this ledger is in memory: test this '
            'function with the fixture jobsync_node'
        )

    # --- for tests ---

    @property
    def completed(self) -> dict[str, Any]:
        """The keys that are complete, and their results."""
        return self._in_state('done', 'result')

    @property
    def running(self) -> list[str]:
        """The keys that are being executed."""
        return list(self._in_state('running', 'state'))

    @property
    def failed(self) -> dict[str, Any]:
        """The keys whose last attempt failed, and its error."""
        return self._in_state('failed', 'error')

    def _in_state(self, state: str, field: str) -> dict[str, Any]:
        with self._lock:
            return {
                key: getattr(row, field) for key, row in self._rows.items() if row.state == state
            }

    def attempts(self, key: str) -> int:
        """How often a key was begun."""
        with self._lock:
            return self._rows[key].attempts if key in self._rows else 0

    def complete(self, key: str, result: Any = None) -> None:
        """Let a key be complete, as if another node had executed it."""
        self._put(key, 'done', decode_result(json.loads(encode_result(result))))

    def hold(self, key: str) -> None:
        """Let a key be running on another node, until `complete` or `forget`."""
        self._put(key, 'running', None)

    def take_over(self, key: str) -> None:
        """Let another node take a running key over: the attempt that runs here ends with Fenced."""
        self._put(key, 'running', None)

    def _put(self, key: str, state: str, result: Any) -> None:
        with self._lock:
            fence = self._rows[key].fence + 1 if key in self._rows else 1
            self._rows[check_key(key)] = _Row(
                state, fence, self._rows[key].attempts if key in self._rows else 1, result
            )

    def forget(self, key: str | None = None) -> None:
        """Forget one key, or all, as the end of their retention does."""
        with self._lock:
            if key is None:
                self._rows.clear()
            else:
                self._rows.pop(key, None)
