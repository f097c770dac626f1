"""Whatever strikes, in whatever line between the begin and the end of an attempt: its key does not
stay taken while its process lives.

An exception is raised in each line in turn of the modules that carry an attempt, in a block, a
function and a coroutine, with and without a transaction, and where the work fails. So it is with
signals (a time limit, Ctrl-C), which strike in any line.
"""

from __future__ import annotations

import asyncio
import dis
import functools
import gc
import itertools
import os
import sys
import threading
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import psycopg2
import pytest

from jobsync_core.config import CoordinationConfig
from jobsync_core.errors import JobSyncError
from jobsync_core.ledger import (
    attempt,
    endings,
    execution,
    former_keys,
    once,
    state,
    transaction,
    unsettled,
)
from jobsync_core.ledger import batch as group_commit
from jobsync_core.ledger import calls as ledger_calls
from jobsync_core.ledger import cluster as ledger
from jobsync_core.ledger import current as current_ledger
from jobsync_core.ledger import options as once_options
from jobsync_core.ledger.cluster import ClusterLedger
from jobsync_core.ledger.current import set_current_ledger
from jobsync_core.ledger.execution import current_execution
from jobsync_core.ledger.once import exactly_once
from jobsync_core.store import base, deadline, executions, transactions
from jobsync_core.store import sessions as connections
from jobsync_core.store.sessions import Sessions
from tests.support.cluster import query
from tests.support.ledgers import insert, ledgers_of
from tests.support.rows import Rows, rows_of
from tests.support.waiting import eventually

MODULES = (
    attempt,
    current_ledger,
    endings,
    execution,
    former_keys,
    group_commit,
    ledger,
    ledger_calls,
    once,
    once_options,
    state,
    transaction,
    unsettled,
    base,
    executions,
    transactions,
)
FILES = {str(Path(module.__file__ or '').resolve()) for module in MODULES}


class Struck(BaseException):
    """What strikes: no Exception, as KeyboardInterrupt is none."""


class Work(Exception):
    """The work's own failure, whose text cannot be made."""

    def __str__(self) -> str:
        raise RuntimeError('no text')


class Strike:
    """Raises in the line number `place` of those that this thread, and the threads that it starts,
    pass; counts them.

    A line at which a `with` statement lets go of a lock is no place: there CPython delivers no
    signal between the block and the release, and so no program can be struck there.
    """

    def __init__(
        self,
        place: int,
        action: Callable[[], object],
        raises: bool = True,
        files: Collection[str] = FILES,
    ) -> None:
        self.place = place
        self._files = files
        self.passed = 0
        self.where = ''
        self._action = action
        self._raises = raises
        self._busy = False

    def __enter__(self) -> Strike:
        self._before = sys.gettrace()
        threading.settrace(self._trace)
        sys.settrace(self._trace)
        return self

    def __exit__(self, *error: object) -> None:
        sys.settrace(self._before)
        threading.settrace(None)

    def _trace(self, frame: FrameType, event: str, argument: object) -> Any:
        if frame.f_code.co_filename not in self._files or threading.current_thread().name in (
            'jobsync ledger',
            'jobsync-deadlines',
        ):
            return None
        return self._line

    def _line(self, frame: FrameType, event: str, argument: object) -> Any:
        if (
            event == 'line'
            and not self._busy
            and not _lets_go(frame.f_code, frame.f_lasti)
            and not (self._raises and _in_finalizer(frame))
        ):
            self.passed += 1
            if self.passed == self.place:
                self.where = (
                    f'{Path(frame.f_code.co_filename).name}:{frame.f_lineno} in '
                    f'{frame.f_code.co_name}'
                )
                self._busy = True
                try:
                    self._action()
                finally:
                    self._busy = False
        return self._line


def _in_finalizer(frame: FrameType | None) -> bool:
    # An exception there reaches nobody: the interpreter reports it and goes on.
    while frame is not None:
        if frame.f_code.co_name == '__del__':
            return True
        frame = frame.f_back
    return False


def _lets_go(code: CodeType, offset: int) -> bool:
    key = code, offset
    if key not in _known:
        rest = (
            each
            for each in dis.get_instructions(code)
            if each.offset >= offset and each.opname not in ('SWAP', 'ROT_TWO', 'NOP')
        )
        found = list(itertools.islice(rest, 3))
        _known[key] = len(found) == 3 and all(
            each.opname == 'LOAD_CONST' and each.argval is None for each in found
        )
    return _known[key]


_known: dict[tuple[CodeType, int], bool] = {}


def strike() -> None:
    raise Struck


@pytest.fixture
def rows(config: CoordinationConfig) -> Iterator[Rows]:
    with rows_of(config) as found:
        found.run('CREATE TABLE effect (key text)')
        yield found


@pytest.fixture
def struck_ledger(rows: Rows) -> Iterator[ClusterLedger]:
    with ledgers_of(rows) as make:
        made = make('a')
        set_current_ledger(made)
        yield made
        set_current_ledger(None)


def strike_apart(place: int, action: Callable[[], object], files: Collection[str] = FILES) -> str:
    """Strike there in a thread of its own; which line that was.

    After an exception out of a trace function, CPython may take one that was being handled for one
    that still is, and hang it on to the end of the chain of each later exception of that thread, in
    other tests, too. With the thread it goes.
    """
    found: list[str] = []

    def run() -> None:
        with Strike(place, strike, files=files) as stroke:
            try:
                action()
            except (Struck, Work, JobSyncError, psycopg2.Error):
                pass
        found.append(stroke.where)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found, 'an exception that is none of these ended the thread'
    return found[0]


@pytest.fixture(autouse=True)
def _leaves_no_exception() -> Iterator[None]:
    yield
    with pytest.raises(ZeroDivisionError) as caught:
        _ = 1 / 0
    assert caught.value.__context__ is None, (
        f'in the chain of all that this thread raises from now on: {type(caught.value.__context__)}'
    )


def block(made: ClusterLedger, key: str, work: Callable[[], object]) -> None:
    with once.once(made, key):
        work()


def function(made: ClusterLedger, key: str, work: Callable[[], object]) -> None:
    @exactly_once(key='{key}', scope='')
    def run(key: str) -> str:
        work()
        return 'result'

    run(key)


def coroutine(made: ClusterLedger, key: str, work: Callable[[], object]) -> None:
    @exactly_once(key='{key}', scope='')
    async def run(key: str) -> str:
        await asyncio.sleep(0)
        work()
        return 'result'

    asyncio.run(run(key))


def nothing() -> None:
    pass


def fail() -> None:
    raise Work


def transact() -> None:
    with current_execution().transaction() as connection:
        insert(connection)


FORMS = (block, function, coroutine)
WORKS = (nothing, fail, transact)


@pytest.mark.timeout(300)
@pytest.mark.parametrize('work', WORKS, ids=lambda work: work.__name__)
@pytest.mark.parametrize('form', FORMS, ids=lambda form: form.__name__)
def test_an_exception_in_any_line_keeps_no_key(
    struck_ledger: ClusterLedger,
    rows: Rows,
    form: Callable[..., None],
    work: Callable[[], object],
    capsys: pytest.CaptureFixture[str],
) -> None:
    struck: dict[str, str] = {}
    with capsys.disabled():
        for place in range(1, 2000):
            key = f'k{place}'
            where = strike_apart(place, functools.partial(form, struck_ledger, key, work))
            if not where:
                break
            struck[key] = where
        assert len(struck) > 60, 'the lines of an attempt were struck'
        print(f'\n{form.__name__}, {work.__name__}: struck in {len(struck)} lines', end='')
    if form is coroutine:
        gc.collect()  # asyncio keeps what struck in a circle with the attempt
    await_end(rows, struck)
    # Nor does the process itself think so.
    here = struck_ledger._locals[os.getpid()].settling
    eventually(lambda: {key: struck[key] for key in [*here.running]} == {})
    if work is transact:
        # An effect is there exactly where its key is complete.
        done = {
            key
            for (key,) in rows.run(f"SELECT key FROM {rows.tables.execution} WHERE state = 'done'")
        }
        assert rows.value('SELECT count(*) FROM effect') == len(done)
        if form is coroutine:
            # What asyncio keeps of an exception that struck goes with the garbage, and the
            # connection with it, whose end the server notices in a moment.
            gc.collect()
            eventually(lambda: left_open(rows) == [])
        assert left_open(rows) == []


def left_open(rows: Rows) -> list[tuple[object, ...]]:
    return rows.run(
        "SELECT pid FROM pg_stat_activity WHERE state LIKE 'idle in%%' AND datname = "
        'current_database()'
    )


def running(rows: Rows) -> list[str]:
    return [
        key
        for (key,) in rows.run(f"SELECT key FROM {rows.tables.execution} WHERE state = 'running'")
    ]


def await_end(rows: Rows, struck: dict[str, str]) -> None:
    try:
        eventually(lambda: running(rows) == [], timeout=20)
    except AssertionError:
        raise AssertionError(
            {key: struck.get(key, 'not struck') for key in running(rows)}
        ) from None


@pytest.mark.timeout(300)
@pytest.mark.parametrize('kind', ['coroutine', 'generator', 'transaction'])
def test_what_is_collected_in_any_line_blocks_nobody_and_keeps_no_key(
    struck_ledger: ClusterLedger, rows: Rows, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A finalizer runs wherever the collector strikes: also while its own thread holds a lock that
    it would want.
    """
    loop = asyncio.new_event_loop()

    @exactly_once(key='{key}', scope='')
    async def suspended(key: str) -> None:
        await asyncio.get_running_loop().create_future()

    def begun(key: str) -> Any:
        if kind == 'coroutine':
            task = suspended(key)

            async def start() -> None:
                pending = task.send(None)  # the begin, in a thread
                while not pending.done():
                    await asyncio.sleep(0)
                task.send(None)

            loop.run_until_complete(start())
            return task

        def generate() -> Iterator[None]:
            with once.once(struck_ledger, key) as begun_here:
                if kind == 'generator':
                    yield
                else:
                    with begun_here.transaction() as connection:
                        insert(connection)
                        yield

        generator = generate()
        next(generator)
        return generator

    gc.collect()
    gc.freeze()  # what the test begins with needs no look at each line
    try:
        place = 0
        while True:
            place += 1
            key = f'lost{place}'
            garbage: list[Any] = [begun(key)]
            garbage.append(garbage)

            del garbage
            with Strike(place, gc.collect, raises=False) as stroke:
                function(struck_ledger, f'other{place}', transact)
            gc.collect()
            if not stroke.where:
                break
        with capsys.disabled():
            print(f'\n{kind}: collected in {place - 1} lines', end='')
        assert place > 60
        await_end(rows, {})
        assert (
            rows.value(f"SELECT count(*) FROM {rows.tables.execution} WHERE state = 'failed'")
            == place
        )
        assert rows.value('SELECT count(*) FROM effect') == place
    finally:
        gc.unfreeze()
        loop.close()


def use(sessions: Sessions) -> None:
    with sessions.session() as connection, connection.cursor() as cursor:
        cursor.execute('SELECT 1')


@pytest.mark.timeout(60)
def test_an_exception_in_any_line_of_a_session_leaves_no_connection_and_no_deadline(
    config: CoordinationConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {str(Path(module.__file__ or '').resolve()) for module in (connections, deadline)}
    struck = 0
    for kept in (False, True):  # where a connection is opened, and where one is kept from before
        for place in range(1, 1000):
            sessions = Sessions(config, 'any line')
            if kept:
                use(sessions)
            where = strike_apart(place, functools.partial(use, sessions), files)
            if not where:
                sessions.close_all()
                break
            struck += 1
            pool = sessions._pools.get(os.getpid())
            if pool is not None:
                idle = [each for _, each in pool._idle]
                assert (
                    [each for each in pool._lent if each not in idle],
                    list(pool.deadlines._watched),
                ) == ([], []), where
                assert not any(each.closed for each in idle), where
            use(sessions)
            sessions.close_all()
            await_closed(config, where)
    with capsys.disabled():
        print(f'\nsessions: struck in {struck} lines', end='')
    assert struck > 60


def await_closed(config: CoordinationConfig, where: str) -> None:
    try:
        eventually(lambda: open_sessions(config) == 0)
    except AssertionError:
        raise AssertionError(where) from None


def open_sessions(config: CoordinationConfig) -> int:
    ((count,),) = query(
        config,
        "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'jobsync any line'",
        (),
    )
    return int(count)
