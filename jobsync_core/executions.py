"""The ledger for operators: which keys were executed, and how; and what to do about some of them.

    from jobsync_core import CoordinationConfig
    from jobsync_core.executions import ExecutionFilter, Executions

    with Executions(CoordinationConfig.from_env()) as executions:
        for each in executions.find(ExecutionFilter(state='lost', function='shop.charge')):
            executions.retry(each['key'])

Everything goes in short statements, whatever the size of the ledger, and waits for no worker; no
worker waits for it.
"""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, TypeVar

from .config import CoordinationConfig
from .errors import (
    ConfigurationError,
    DuplicateExecution,
    ExecutionRunning,
    NoSuchExecution,
    NotSent,
)
from .ledger.keys import escape
from .ledger.limits import DEFAULT_RETENTION, check_key
from .results import ExecutionDetails, FormerAttempt, RecordedExecution
from .store.ledger import LedgerStore, Slice
from .store.selection import Selection, check_text
from .store.sessions import Sessions
from .store.tables import Tables

__all__ = [
    'STATES',
    'ExecutionDetails',
    'ExecutionFilter',
    'Executions',
    'FormerAttempt',
    'NoSuchExecution',
    'RecordedExecution',
]

#: What an execution can be. A lost one was running on a node that is gone: whoever gets its message
#: takes it over. A dead one was lost too often: nothing begins it any more.
STATES = ('running', 'lost', 'done', 'failed', 'dead')
_PAGE = 5000
_RACES = 10

P = ParamSpec('P')
T = TypeVar('T')


@dataclass(frozen=True)
class ExecutionFilter:
    r"""Which executions are meant: those to which all applies that is given.

    Args:
        state: 'running', 'lost', 'done', 'failed' or 'dead', or several of them.
        key: A pattern for the whole key, as in SQL's LIKE: `%` is any text, `_` one character, `\`
            takes the meaning from what follows.
        function: Name of the task, the actor or the function, or the `scope` of `exactly_once`:
            what its keys begin with.
        node: Name of the node that made the last attempt.
        older_than: A timedelta, or seconds: since the last attempt ended, or began while it has no
            end.

    Raises:
        ConfigurationError: A value cannot be looked for.
    """

    state: str | Sequence[str] | None = None
    key: str | None = None
    function: str | None = None
    node: str | None = None
    older_than: datetime.timedelta | float | None = None

    def __post_init__(self) -> None:
        if self.state is not None and not (self.states and set(self.states) <= set(STATES)):
            raise ConfigurationError(
                f'state={self.state!r}: use one or several of {", ".join(map(repr, STATES))}'
            )
        if self.key is not None:
            check_text('key', self.key, pattern=True)
        for name, value in (('function', self.function), ('node', self.node)):
            if value is not None:
                check_text(name, value)
        self._seconds()

    @property
    def states(self) -> tuple[str, ...]:
        """The states that are meant."""
        if self.state is None:
            return STATES
        return (self.state,) if isinstance(self.state, str) else tuple(self.state)

    @property
    def selects_all(self) -> bool:
        """Whether nothing is given."""
        return self == ExecutionFilter()

    @property
    def selection(self) -> Selection:
        """The same, for the store."""
        return Selection(
            None if self.state is None else self.states,
            '' if self.function is None else f'{escape(self.function, ":")}:',
            self.key,
            self.node,
            self._seconds(),
        )

    def _seconds(self) -> float | None:
        age = self.older_than
        seconds = age.total_seconds() if isinstance(age, datetime.timedelta) else age
        if seconds is None:
            return None
        if (
            isinstance(seconds, bool)
            or not isinstance(seconds, (int, float))
            or not math.isfinite(seconds)
            or not 0 <= seconds <= 1e9
        ):
            raise ConfigurationError(
                f'older_than={age!r}: give a timedelta or seconds, not less than zero'
            )
        return float(seconds)


_ALL = ExecutionFilter()


class Executions:
    """The ledger of a cluster, for operators and their programs. Threads may share it.

    Args:
        config: Where the tables are.
        send: Sends a message again that the ledger has kept with a dead key, for `retry`: of the
            plugin for Celery, `JobSync.of(app).resend`.

    All calls raise DatabaseUnavailable where the database cannot be reached, or refuses.
    """

    def __init__(
        self, config: CoordinationConfig, send: Callable[[Mapping[str, Any]], object] | None = None
    ) -> None:
        self._send = send
        self._sessions = Sessions(config, 'jobsync executions')
        self._tables = Tables.of(config)

    def __enter__(self) -> Executions:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close its connections. It opens them again where it is used again."""
        self._sessions.close_all()

    def find(
        self, which: ExecutionFilter = _ALL, *, limit: int | None = None, after: str = ''
    ) -> Iterator[RecordedExecution]:
        """Executions in the order of their keys, read as they are asked for.

        Args:
            which: Which ones.
            limit: How many at most; None: all.
            after: Only those whose key comes behind this one: where an earlier call left off.

        Raises:
            ConfigurationError: `after` cannot be a key.
        """
        if after:
            check_text('after', after)
        return self._find(which, limit, after)

    def _find(
        self, which: ExecutionFilter, limit: int | None, after: str
    ) -> Iterator[RecordedExecution]:
        selection, left = which.selection, math.inf if limit is None else limit
        while left > 0:
            page = self._ask(LedgerStore.page, selection, after, int(min(left, _PAGE)))
            yield from page.rows
            left -= len(page.rows)
            if page.last is None:
                return
            after = page.last

    def count(self, which: ExecutionFilter = _ALL) -> int:
        """How many there are: it looks at each."""
        return self._through(LedgerStore.count, which.selection)

    def show(self, key: str) -> ExecutionDetails:
        """What is known of one key.

        Raises:
            NoSuchExecution: The ledger does not have it.
        """
        check_key(key)
        found = self._ask(LedgerStore.look, key)
        if found is None:
            raise _unknown(key)
        return found

    @property
    def sends(self) -> bool:
        """Whether `retry` can send a message that is kept."""
        return self._send is not None

    def retry(self, key: str) -> ExecutionDetails:
        """Have a key that failed, was lost or is dead free for its next attempt, as if none had
        been lost; what it is then.

        Where the ledger has kept its message (`message`), that is sent, if this object was told
        how. Any other message is not: the broker may have it still, among dead letters perhaps, and
        otherwise whoever sent it sends it again.

        Raises:
            NoSuchExecution: The ledger does not have it, so that it is free.
            ExecutionRunning: A live node is at it.
            DuplicateExecution: It is complete. `forget` makes it run again.
            NotSent: It is free, but its message could not be sent. Call it again.
        """
        self._change(key, _free)
        found = self.show(key)
        if found['message'] is not None and self._send is not None:
            try:
                self._send(json.loads(found['message']))
            except Exception as error:  # whatever the application's broker raises
                raise NotSent(
                    f'the key {key!r} is free, but its message is not sent, and still kept: {error}'
                ) from error
        return found

    def forget(self, key: str) -> RecordedExecution:
        """Delete what the ledger knows of a key, so that it runs when its message comes again; what
        it was.

        Raises:
            NoSuchExecution: The ledger does not have it.
            ExecutionRunning: A live node is at it.
        """
        return self._change(key, _forget)

    def purge(self, which: ExecutionFilter) -> int:
        """Delete all that a filter selects, but none that a live node is at; how many. Messages
        that are kept with dead keys go with them.

        It goes in steps, each of which is committed: what it has deleted when it fails stays so.
        Rows that somebody has locked at the moment stay, too.

        Raises:
            ConfigurationError: It is to delete running executions.
        """
        if which.state is not None and 'running' in which.states:
            raise ConfigurationError(
                "state='running': an execution that runs is not deleted; stop its node, then it is "
                "'lost'"
            )
        return self._through(LedgerStore.purge, which.selection)

    def _change(
        self, key: str, act: Callable[[LedgerStore, ExecutionDetails], bool]
    ) -> ExecutionDetails:
        """Do what a key's row allows, as it was seen; again where it was changed meanwhile."""
        for _ in range(_RACES):
            found = self.show(key)
            if found['state'] == 'running':
                raise _running(found)
            if self._ask(act, found):
                return found
        busy = ExecutionRunning(
            f'others are changing the key {key!r} at this very moment: look at it again'
        )
        busy.key = key
        raise busy

    def _through(
        self, step: Callable[[LedgerStore, Selection, str], Slice], selection: Selection
    ) -> int:
        """Take one step after the other through the table; the sum of what they did."""
        total, after = 0, ''
        while True:
            done = self._ask(step, selection, after)
            total += done.number
            if done.last is None:
                return total
            after = done.last

    def _ask(
        self, question: Callable[Concatenate[LedgerStore, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Ask the store, in a transaction of its own."""
        with self._sessions.session() as connection:
            return question(LedgerStore(connection, self._tables), *args, **kwargs)


def _free(store: LedgerStore, found: ExecutionDetails) -> bool:
    """What `retry` does about a key that nobody is at."""
    key = found['key']
    if found['state'] == 'done':
        complete = DuplicateExecution(
            f'the key {key!r} is complete, and is not tried again; to have it run once more, '
            'forget it first'
        )
        complete.key = key
        raise complete
    return store.free(
        key,
        found['fence'],
        f'its node {found["node"]} was gone: an operator freed the key',
        DEFAULT_RETENTION.total_seconds(),
    )


def _forget(store: LedgerStore, found: ExecutionDetails) -> bool:
    return store.forget(found['key'], found['fence'])


def _unknown(key: str) -> NoSuchExecution:
    return NoSuchExecution(
        f'the ledger has no key {key!r}: it was never begun, or its retention is over; the key of '
        "a function's call is its scope, ':' and the key that the decorator gives"
    )


def _running(found: ExecutionDetails) -> ExecutionRunning:
    silent = found['silent_sec']
    running = ExecutionRunning(
        f'the key {found["key"]!r} is being executed on {found["node"]}, process {found["pid"]}'
        + (f', whose last heartbeat was {silent:.0f} s ago' if silent is not None else '')
        + ': wait for its end, or stop that node'
    )
    running.key = found['key']
    return running
