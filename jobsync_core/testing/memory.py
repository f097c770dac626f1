"""A ledger in memory: keys complete once, as in the database, for as long as the test lasts."""

from __future__ import annotations

import json
import threading
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import ConfigurationError, DuplicateExecution, ExecutionRunning, Fenced
from ..ledger.limits import check_key
from ..ledger.results import decode_result, encode_result
from ..ledger.single import SingleLedger
from ..ledger.state import Unsettled

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
        # A coroutine may be collected while its own thread is in here.
        self._lock = threading.RLock()
        self._rows: dict[str, _Row] = {}

    def begin(self, mine: Unsettled) -> None:
        """Begin an attempt.

        Raises:
            DuplicateExecution: The key was completed; `.result` is its stored result.
            ExecutionRunning: Another attempt is running.
        """
        key = check_key(mine.key)
        with self._lock:
            row = self._rows.get(key)
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
            mine.begin(row.fence, row.attempts)

    def settle(self, mine: Unsettled) -> None:
        """Complete the key, or let the next attempt begin.

        Raises:
            Fenced: `take_over` was called for it meanwhile.
        """
        mine.settled = True
        if mine.succeeded:
            self._finish(mine)
        else:
            self._fail(mine, mine.error)

    def leave(self, mine: Unsettled) -> None:
        """Let the next attempt begin, if the end of this one is not recorded."""
        if mine.began and not mine.settled and not mine.busy:
            mine.settled = True
            self._fail(mine, 'abandoned')

    def _finish(self, mine: Unsettled) -> None:
        with self._lock:
            row = self._rows.get(mine.key)
            if row is None or row.fence != mine.fence:
                raise Fenced(
                    f'another attempt has taken the key {mine.key!r} over; this one (fence '
                    f'{mine.fence}) is not recorded'
                )
            row.state = 'done'
            row.result = decode_result(json.loads(mine.encoded)) if mine.encoded else None
            mine.complete(mine.encoded)

    def _fail(self, mine: Unsettled, error: str) -> None:
        with self._lock:
            row = self._rows.get(mine.key)
            if row is not None and row.fence == mine.fence:
                row.state, row.error = 'failed', error

    def transaction_of(self, mine: Unsettled) -> AbstractContextManager[PgConnection]:
        """There is none."""
        raise ConfigurationError(
            'execution.transaction() needs a database, and this ledger is in memory: test this '
            'function with the fixture jobsync_node'
        )

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
