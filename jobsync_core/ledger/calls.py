"""What the ledger asks of the database: each call is a transaction of its own, shared with other
threads' where there are any.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from .. import clock
from ..errors import (
    BadData,
    DatabaseRefused,
    DatabaseUnavailable,
    LockNotAvailable,
    StatementRefused,
    StoreTimeout,
    TransactionConflict,
)
from ..logs import Repeats, get_logger
from ..process import is_known_dead
from ..store.blockers import BlockerStore, name_all
from ..store.completions import LOST, PENDING, Completion
from ..store.executions import ExecutionStore, Holder, Row
from ..store.refusals import refusal
from .batch import GroupCommit

if TYPE_CHECKING:
    from ..store.sessions import Sessions
    from ..store.tables import Tables

__all__ = ['LedgerCalls']

logger = get_logger(__name__)

_RACES = 10
#: SQLSTATE of a lock that was waited for too long.
_LOCKED = '55P03'
#: What is found where others are at the key at this very moment.
_BUSY = Row(
    began=False,
    registered=True,
    state='running',
    free=False,
    fence=0,
    attempts=0,
    result=None,
    holder=None,
)

#: A key, who wants it, and how many attempts at it may be lost.
_Wanted: TypeAlias = 'tuple[str, Holder, int | None]'

T = TypeVar('T')
R = TypeVar('R')


class LedgerCalls:
    """The calls of one node's ledger. Threads and forked children may share it.

    All of them raise DatabaseUnavailable where nobody knows whether they were carried out; and
    DatabaseRefused, which is one, where the server refused and changed nothing.

    Args:
        sessions: Connections to the database.
        tables: Names of the tables.
    """

    def __init__(self, sessions: Sessions, tables: Tables) -> None:
        self._sessions = sessions
        self._tables = tables
        # By process: a forked child begins with nothing of its parent's under way.
        self._begins: dict[int, GroupCommit[_Wanted, Row]] = {}
        self._finishes: dict[int, GroupCommit[Completion, bool]] = {}
        self._repeats = Repeats()

    def begin(self, key: str, holder: Holder, max_lost: int | None = None) -> Row:
        """Take the key, if it can be taken.

        Args:
            key: The key.
            holder: Who takes it.
            max_lost: Attempts at it that may be lost; then it is dead. None: any number.
        """
        return self._grouped(self._begins, self._begin_one, self._begin_many).send(
            (key, holder, max_lost)
        )

    def has_prefix(self, prefix: str) -> bool:
        """Whether there is any key that begins so; a prefix ends with ':'."""
        return self._call(lambda store: store.has_prefix(prefix))

    def find(self, keys: Sequence[str], old: Sequence[str]) -> tuple[str, str | None] | None:
        """State and result of the first of these keys that is complete, else 'running' where one is
        held by a live node, or one's result is still to come from it. Those in `old` count only
        where an earlier version began them.
        """
        return self._call(lambda store: store.find(keys, old))

    def finish(self, completion: Completion) -> bool:
        """Record a completion; False where another attempt holds the key. A result that the
        database refuses is left out.
        """
        return self._grouped(self._finishes, self._finish_one, self._finish_many).send(completion)

    def put_result(self, key: str, fence: int, result: str | None) -> None:
        """Store the result of a completion that carried none, or that there is none; so, too,
        where the database refuses the result.
        """

        def put(store: ExecutionStore) -> None:
            try:
                store.put_result(key, fence, result)
            except BadData as error:
                if result is None:
                    raise
                self._say_refused(key, error)
                store.put_result(key, fence, None)

        self._call(put)

    def settle(self, key: str, fence: int, error: str, retention_sec: float) -> str | None:
        """End an attempt that did not complete; the state that it is in now. An error text that the
        database refuses is left out.
        """

        def end(store: ExecutionStore) -> str | None:
            try:
                return store.settle(key, fence, error, retention_sec)
            except BadData:
                return store.settle(key, fence, _plain(error), retention_sec)

        return self._call(end)

    def stored(self, key: str, fence: int) -> tuple[str, str | None] | None:
        """State and result of an attempt's row; None where another attempt holds the key."""
        return self._call(lambda store: store.stored(key, fence))

    def release(
        self,
        node: str,
        incarnation: str,
        pid: int,
        error: str,
        retention_sec: float,
        key: str | None = None,
    ) -> int:
        """Let others take over what a process was running (or its one `key`); how many keys."""
        return self._call(
            lambda store: store.release(node, incarnation, pid, error, retention_sec, key)
        )

    def keep(self, key: str, message: str) -> bool:
        """Keep the message of a dead key, as JSON text, unless one is kept; False where the key is
        not dead any more.
        """
        return self._call(lambda store: store.keep(key, message))

    def _grouped(
        self,
        groups: dict[int, GroupCommit[T, R]],
        one: Callable[[T], R],
        many: Callable[[Sequence[T]], Sequence[R | None]],
    ) -> GroupCommit[T, R]:
        pid = os.getpid()
        found = groups.get(pid)
        return (
            found
            if found is not None
            else groups.setdefault(pid, GroupCommit(one, many, 3 * self._sessions.longest_call_sec))
        )

    def _begin_one(self, wanted: _Wanted) -> Row:
        return self._call(lambda store: self._claim(store, *wanted))

    def _begin_many(self, wanted: Sequence[_Wanted]) -> Sequence[Row | None]:
        keys, limits = [key for key, _, _ in wanted], [most for _, _, most in wanted]
        holder = wanted[0][1]
        if any(other != holder for _, other, _ in wanted):
            return [None] * len(wanted)  # this node has just got another incarnation
        rows = self._call_many(lambda store: store.begin_many(keys, holder, limits))
        if rows is None:
            return [None] * len(wanted)
        return [
            row
            if row.began
            or row.dead
            or not row.registered
            or (row.state == 'done' and row.result != PENDING)
            else None
            for row in rows
        ]

    def _finish_many(self, completions: Sequence[Completion]) -> Sequence[bool | None]:
        found = self._call_many(lambda store: store.finish_many(completions))
        return [None] * len(completions) if found is None else found

    def _claim(self, store: ExecutionStore, key: str, holder: Holder, max_lost: int | None) -> Row:
        for _ in range(_RACES):
            try:
                row = store.begin(key, holder, max_lost)
            except LockNotAvailable:
                self._check_table(store)
                if store.state_of(key) == 'running':
                    return _BUSY  # a transaction that completes the key is open
                raise DatabaseRefused(
                    f'nothing was begun: somebody has locked the row of {key!r} in the ledger, or '
                    'had locked its table',
                    _LOCKED,
                ) from None
            if row.began or row.dead or not row.registered:
                return row
            if row.free or row.state is None:
                continue
            if row.state == 'done':
                if row.result != PENDING:
                    return row
                if _is_gone(row, holder):
                    # Other machines cannot tell while the node lives whose child that process was.
                    store.put_result(key, row.fence, LOST)
                    return dataclasses.replace(row, result=LOST)
                found = store.late_result(key, row.fence)
                if found is None:
                    continue
                late, is_held = found
                state = 'running' if late == PENDING and is_held else 'done'
                return dataclasses.replace(row, state=state, result=late)
            if not _is_gone(row, holder):
                return row
            # A row of this very process that it does not hold is an attempt whose begin was not
            # answered: it has not run, and was not lost.
            lost = row.holder != holder
            if lost and max_lost is not None and row.lost >= max_lost:
                if store.bury(key, holder, row.fence):
                    return dataclasses.replace(row, dead=True)
                continue
            taken = store.take_over(key, holder, row.fence, lost)
            if taken is not None:
                return dataclasses.replace(row, began=True, fence=taken[0], attempts=taken[1])
        return _BUSY

    def _check_table(self, store: ExecutionStore) -> None:
        """Whoever waited for a lock: was it the whole table's? Then no key is being executed, and
        none can be begun.

        Raises:
            DatabaseRefused: Somebody has locked it against changes, or waits to do so, and
                everybody else behind him.
        """
        tables = self._tables
        blockers = BlockerStore(store.connection, tables)
        found = blockers.on_tables([tables.execution]) + [
            each for each in blockers.on_tables([tables.node]) if each.mode == 'AccessExclusiveLock'
        ]
        if not found:
            return
        said = (
            'nothing can be begun or recorded, as a whole table of the ledger is locked: '
            f'{name_all(found)}; '
            'it goes on by itself when that transaction ends'
        )
        more = self._repeats.say('table', clock.now())
        if more is not None:
            logger.warning('%s%s', said, more)
        raise DatabaseRefused(said, _LOCKED, True)

    def _finish_one(self, completion: Completion) -> bool:
        return self._call(lambda store: self._record(store, completion))

    def _record(self, store: ExecutionStore, completion: Completion) -> bool:
        try:
            return store.finish(completion)
        except BadData as error:
            if completion.result is None:
                raise
            self._say_refused(completion.key, error)
            return store.finish(dataclasses.replace(completion, result=None))

    def _say_refused(self, key: str, error: BadData) -> None:
        more = self._repeats.say('result', clock.now())
        if more is not None:
            logger.warning(
                'key=%s completed without its result, which the database refuses: %s%s',
                key,
                error,
                more,
            )

    def _call_many(self, action: Callable[[ExecutionStore], T]) -> T | None:
        """None where one of the keys would have had to wait for another transaction: nothing was
        done.
        """

        def without_waiting(store: ExecutionStore) -> T | None:
            try:
                return action(store)
            except LockNotAvailable:
                return None

        return self._call(without_waiting)

    def _call(self, action: Callable[[ExecutionStore], T]) -> T:
        """Run statements that each commit by themselves; a second time on a new connection, if the
        first connection was lost.
        """
        try:
            return self._call_once(action)
        except (StoreTimeout, DatabaseRefused):
            raise
        except DatabaseUnavailable as error:
            sent = error.sent
        try:
            return self._call_once(action)
        except DatabaseUnavailable as error:
            if not sent:
                raise
            # What is known of the second time says nothing about the first.
            raise DatabaseUnavailable(str(error)) from error

    def _call_once(self, action: Callable[[ExecutionStore], T]) -> T:
        sent = False
        try:
            with self._sessions.session() as connection:
                connection.autocommit = True
                sent = True
                try:
                    return self._act(ExecutionStore(connection, self._tables), action)
                finally:
                    if not connection.closed:
                        connection.autocommit = False
        except StatementRefused as error:
            raise refusal(error, 'a statement of the ledger') from error.__cause__
        except DatabaseRefused:
            raise
        except DatabaseUnavailable as error:
            error.sent = sent
            raise

    def _act(self, store: ExecutionStore, action: Callable[[ExecutionStore], T]) -> T:
        for _ in range(_RACES):
            try:
                return action(store)
            except LockNotAvailable:
                self._check_table(store)
                raise
            except TransactionConflict:
                pass  # it is worth to ask again at once
        return action(store)


def _plain(text: str) -> str:
    return text.encode('ascii', 'replace').decode()


def _is_gone(row: Row, me: Holder) -> bool:
    return row.holder is not None and (row.holder == me or is_known_dead(row.holder.process))
