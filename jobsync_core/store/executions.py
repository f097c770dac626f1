"""The ledger's rows: one per key, with the fence that only its newest attempt holds.

`begin` is a compare-and-swap in one statement, within a function: it looks at the row in the
statement's snapshot, decides there whether the key is free, and takes it only if the row is still
the one that it looked at. So a decision never mixes an old view of the node table with a newer row,
and duplicates of a completed key cost a read and no lock.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..process import Process
from .base import Store
from .completions import PENDING, Completion, in_order

__all__ = ['Began', 'ExecutionStore', 'Holder', 'Row']


@dataclass(frozen=True)
class Holder:
    """Who executes: a node's incarnation, and the process that runs for it."""

    node: str
    incarnation: str
    process: Process


@dataclass(frozen=True)
class Row:
    """What `begin` found.

    Args:
        began: The caller holds the key now, by `fence`.
        registered: The caller's incarnation is in the node table; without that nothing is begun.
        state: 'running', 'done', 'failed' or 'dead', before this call; None where there is no row.
        free: The row may be taken over, but another process has just done so: ask again.
        result: JSON text.
        holder: Who holds or held the key.
        lost: How many attempts at the key were lost; the one that was taken over is among them.
        dead: Too many were lost: nothing begins the key.
    """

    began: bool
    registered: bool
    state: str | None
    free: bool
    fence: int
    attempts: int
    result: str | None
    holder: Holder | None
    lost: int = 0
    dead: bool = False


@dataclass(frozen=True)
class Began:
    """By what a transaction of the user's is known.

    Args:
        stamp: When it began, in microseconds.
        backend: Process id of the server's process.
    """

    stamp: int
    backend: int


#: Seconds for which a transaction of the user's may be silent between two statements, and between
#: the completion and the commit.
USERS_IDLE_SEC, _COMMIT_SEC = 3600, 10

#: Seconds for which a key whose row is locked is waited for.
_BEGIN_WAIT_SEC = 1


class ExecutionStore(Store):
    """The ledger."""

    def begin(self, key: str, holder: Holder, max_lost: int | None = None) -> Row:
        """Take the key if it is new, failed, expired, or running under an incarnation that is no
        longer in the node table; where as many attempts at it were lost as may be, it is dead from
        now on instead.

        A row with `began` and `dead` false and `free` true, or with no state, lost a race: ask
        again.

        Args:
            key: The key.
            holder: Who takes it.
            max_lost: Attempts that may be lost; None: there is no limit.
        """
        parameters = {'key': key, 'max_lost': max_lost, 'wait': f'{_BEGIN_WAIT_SEC}s'}
        (values,) = self._rows('execution.begin', {**_holding(holder), **parameters})
        return _row(values)

    def begin_many(
        self, keys: Sequence[str], holder: Holder, limits: Sequence[int | None] = ()
    ) -> list[Row]:
        """`begin` for several keys, each given once, in one transaction; their rows in the same
        order.

        Args:
            keys: The keys.
            holder: Who takes them.
            limits: Attempts that may be lost, for each key; where none are given there is no limit.

        Raises:
            StatementRefused: Nothing was begun; LockNotAvailable where one of the keys would have
                to wait for another transaction.
        """
        order = sorted(range(len(keys)), key=keys.__getitem__)
        limits = limits or [None] * len(keys)
        rows = self._rows(
            'execution.begin_many',
            {
                **_holding(holder),
                'keys': [keys[place] for place in order],
                'limits': [limits[place] for place in order],
            },
        )
        found = {order[number - 1]: _row(values) for number, *values in rows}
        return [found[place] for place in range(len(keys))]

    def take_over(
        self, key: str, holder: Holder, fence: int, lost: bool = True
    ) -> tuple[int, int] | None:
        """Take a running key whose holder is known to be dead, if its fence is still `fence`;
        returns the new fence and attempts.

        Args:
            key: The key.
            holder: Who takes it.
            fence: Of the attempt that had it.
            lost: Whether that one was lost; otherwise it has not run.
        """
        row = self._row(
            'execution.take_over', {**_holding(holder), 'key': key, 'fence': fence, 'lost': lost}
        )
        return (row[0], row[1]) if row else None

    def bury(self, key: str, holder: Holder, fence: int) -> bool:
        """Have a running key be dead whose holder is known to be dead, as too many attempts at it
        were lost; False where its fence is not `fence` any more.
        """
        row = self._row('execution.bury', {'key': key, 'fence': fence, 'node': holder.node})
        return row is not None and bool(row[0])

    def keep(self, key: str, message: str) -> bool:
        """Keep the message of a dead key, as JSON text, unless one is kept; False where the key is
        not dead any more.
        """
        return self._run('execution.keep', {'key': key, 'message': message}) == 1

    def begin_transaction(self) -> Began:
        """Begin a transaction of the user's: without the limits of short calls, and known, so that
        its end is noticed.
        """
        ((*_, stamp, backend),) = self._rows(
            'execution.begin_transaction', {'idle': f'{USERS_IDLE_SEC}s'}
        )
        return Began(stamp, backend)

    def is_same(self, began: Began) -> bool:
        """Whether the transaction that `begin_transaction` began is still open."""
        return self._rows('execution.which_transaction') == [(began.stamp, began.backend)]

    def complete(self, completion: Completion, began: Began, lock_timeout_ms: int) -> bool:
        """Complete a key at the end of a transaction of the user's on a connection of ours, if it
        is still the same one.

        Args:
            completion: What to record.
            began: What `begin_transaction` gave.
            lock_timeout_ms: How long it may wait for an earlier transaction that may have completed
                the key as well.
        """
        completed = self._run(
            'execution.complete_if_same',
            (
                lock_timeout_ms,
                _COMMIT_SEC * 1000,
                *in_order(completion),
                '',
                began.stamp,
                began.backend,
            ),
        )
        return completed == 1

    def stored(self, key: str, fence: int) -> tuple[str, str | None] | None:
        """State and result (JSON text) of an attempt's row; None where another attempt holds the
        key.
        """
        row = self._row('execution.stored', {'key': key, 'fence': fence})
        return (row[0], row[1]) if row else None

    def state_of(self, key: str) -> str | None:
        """State of a key's row, without waiting for whoever has locked it."""
        row = self._row('execution.state', {'key': key})
        return str(row[0]) if row else None

    def finish(self, completion: Completion) -> bool:
        """Record a completion, again if need be; False where another attempt holds the key."""
        finished = self._run(
            'execution.finish',
            {
                'result': completion.result,
                'retention': completion.retention_sec,
                'key': completion.key,
                'fence': completion.fence,
            },
        )
        return finished == 1

    def finish_many(self, completions: Sequence[Completion]) -> list[bool]:
        """`finish` for several keys, each given once, in one transaction; what became of them in
        the same order.

        Raises:
            StatementRefused: Nothing was recorded; LockNotAvailable where one of the keys would
                have to wait for another transaction.
        """
        order = sorted(range(len(completions)), key=lambda place: completions[place].key)
        ordered = [completions[place] for place in order]
        rows = self._rows(
            'execution.finish_many',
            {
                'results': [each.result for each in ordered],
                'retentions': [each.retention_sec for each in ordered],
                'keys': [each.key for each in ordered],
                'fences': [each.fence for each in ordered],
            },
        )
        found = {order[number - 1]: bool(finished) for number, finished in rows}
        return [found[place] for place in range(len(completions))]

    def has_prefix(self, prefix: str) -> bool:
        """Whether there is any key that begins so; a prefix ends with ':'."""
        # ';' comes after ':'
        ((found,),) = self._rows(
            'execution.has_prefix', {'first': prefix, 'end': prefix[:-1] + ';'}
        )
        return bool(found)

    def find(self, keys: Sequence[str], old: Sequence[str]) -> tuple[str, str | None] | None:
        """State and result (JSON text) of the first of these keys that is complete, else 'running'
        where one is held by a live node, or one's result is still to come from it.

        Those of them that are in `old` count only where an earlier version began them, before the
        tables were of this version.
        """
        row = self._row(
            'execution.find', {'keys': list(keys), 'old': list(old), 'pending': PENDING}
        )
        return (str(row[0]), row[1]) if row else None

    def late_result(self, key: str, fence: int) -> tuple[str | None, bool] | None:
        """The result (JSON text) of an attempt's row, and whether the incarnation that made the
        attempt is in the node table; None where another attempt holds the key.
        """
        row = self._row('execution.late_result', {'key': key, 'fence': fence})
        return (row[0], bool(row[1])) if row else None

    def put_result(self, key: str, fence: int, result: str | None) -> None:
        """Store the result of a completion that carried none, or that there is none."""
        self._run(
            'execution.put_result',
            {'result': result, 'key': key, 'fence': fence, 'pending': PENDING},
        )

    def settle(self, key: str, fence: int, error: str, retention_sec: float) -> str | None:
        """End an attempt that did not complete: it becomes 'failed', unless a transaction that
        completes it is under way.

        Returns the state that the attempt is in now: 'failed', 'done', 'running' (its row is
        locked: ask again later), or None where another attempt holds the key.
        """
        row = self._row(
            'execution.settle',
            {'key': key, 'fence': fence, 'error': error, 'retention': retention_sec},
        )
        return row[0] if row else None

    def release(
        self,
        node: str,
        incarnation: str,
        pid: int,
        error: str,
        retention_sec: float,
        key: str | None = None,
    ) -> int:
        """Let others take over what a process of this incarnation was running (or its one `key`);
        returns how many keys.
        """
        ((number,),) = self._rows(
            'execution.release',
            {
                'node': node,
                'incarnation': incarnation,
                'pid': pid,
                'error': error,
                'retention': retention_sec,
                'key': key,
            },
        )
        return int(number)


def _holding(holder: Holder) -> dict[str, object]:
    process = holder.process
    return {
        'node': holder.node,
        'incarnation': holder.incarnation,
        'host': process.host,
        'boot_id': process.boot_id,
        'pid_namespace': process.pid_namespace,
        'pid': process.pid,
        'started': process.started,
    }


def _row(values: Sequence[Any]) -> Row:
    (
        began,
        registered,
        state,
        free,
        fence,
        attempts,
        result,
        node,
        incarnation,
        host,
        boot_id,
        pid_namespace,
        pid,
        started,
        lost,
        dead,
    ) = values
    holder = None
    if state is not None:
        process = Process(
            host=host or '',
            boot_id=boot_id or '',
            pid_namespace=pid_namespace or '',
            pid=pid or 0,
            started=started or '',
        )
        holder = Holder(node or '', str(incarnation or ''), process)
    return Row(
        began,
        registered,
        state,
        bool(free),
        fence or 0,
        attempts or 0,
        result,
        holder,
        lost or 0,
        bool(dead),
    )
