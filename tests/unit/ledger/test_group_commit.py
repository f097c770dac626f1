"""Group commit: every caller gets what became of its own item, whatever happens to the one that
sends it.
"""

from __future__ import annotations

import ctypes
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from jobsync_core.errors import DatabaseRefused, DatabaseUnavailable, StoreTimeout
from jobsync_core.ledger import batch as group_commit
from jobsync_core.ledger.batch import GroupCommit
from tests.support.waiting import eventually

Commit = GroupCommit[int, str]


class Database:
    """Sends numbers; notes in which batches, and can be held up."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.open = threading.Event()
        self.open.set()
        self.sent = threading.Event()
        self.answer: Callable[[Sequence[int]], Sequence[str | None]] = lambda items: [
            f'many {item}' for item in items
        ]
        self.commit = Commit(self.one, self.many, 30)

    def one(self, item: int) -> str:
        self.batches.append([item])
        self.sent.set()
        assert self.open.wait(30)
        return f'one {item}'

    def many(self, items: Sequence[int]) -> Sequence[str | None]:
        self.batches.append(list(items))
        return self.answer(items)

    @contextmanager
    def waiting(self, items: Sequence[int]) -> Iterator[list[Future[str]]]:
        """Callers with these items wait for a batch; at the end of the block theirs has
        been sent.
        """
        self.open.clear()
        with ThreadPoolExecutor(len(items) + 1) as pool:
            first = pool.submit(self.commit.send, 0)
            assert self.sent.wait(30)
            futures = []
            for number, item in enumerate(items):
                futures.append(pool.submit(self.commit.send, item))
                eventually(lambda expected=number + 1: self.commit.waiting == expected)  # type: ignore[misc]
            try:
                yield futures
            finally:
                self.open.set()
            assert first.result(30) == 'one 0'


@pytest.fixture
def database(monkeypatch: pytest.MonkeyPatch) -> Database:
    monkeypatch.setattr(group_commit, '_PATIENCE_SEC', 30.0)
    return Database()


def test_a_lone_caller_goes_at_once_and_by_itself(database: Database) -> None:
    assert [database.commit.send(item) for item in (1, 2)] == ['one 1', 'one 2']
    assert database.batches == [[1], [2]]


def test_those_who_come_while_a_batch_is_sent_go_together_in_the_next(database: Database) -> None:
    with database.waiting([1, 2, 3]) as futures:
        pass
    assert [future.result(30) for future in futures] == ['many 1', 'many 2', 'many 3']
    assert [sorted(group) for group in database.batches] == [[0], [1, 2, 3]]


def test_a_batch_that_takes_long_holds_nobody_up(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ThreadPoolExecutor(2) as pool, database.waiting([]):
        monkeypatch.setattr(group_commit, '_PATIENCE_SEC', 0.01)
        database.commit._one = lambda item: f'meanwhile {item}'
        assert pool.submit(database.commit.send, 1).result(30) == 'meanwhile 1'
        assert pool.submit(database.commit.send, 2).result(30) == 'meanwhile 2'
        assert not database.open.is_set()


def test_a_waiting_caller_that_loses_patience_takes_the_others_along(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ThreadPoolExecutor(3) as pool, database.waiting([]):
        monkeypatch.setattr(group_commit, '_PATIENCE_SEC', 2.0)
        futures = [pool.submit(database.commit.send, item) for item in (1, 2, 3)]
        assert [future.result(30) for future in futures] == ['many 1', 'many 2', 'many 3']
    assert [sorted(group) for group in database.batches] == [[0], [1, 2, 3]]


def test_what_the_server_refuses_goes_one_by_one_so_that_the_bad_one_fails_alone(
    database: Database,
) -> None:
    def refuse(items: Sequence[int]) -> Sequence[str | None]:
        raise DatabaseRefused('2 is bad')

    def one(item: int) -> str:
        if item == 2:
            raise DatabaseRefused('2 is bad')
        return f'one {item}'

    database.answer = refuse
    with database.waiting([1, 2, 3]) as futures:
        database.commit._one = one
    assert (futures[0].result(30), futures[2].result(30)) == ('one 1', 'one 3')
    with pytest.raises(DatabaseRefused, match='2 is bad'):
        futures[1].result(30)


def test_a_server_that_would_refuse_all_is_not_asked_for_each(database: Database) -> None:
    def refuse(items: Sequence[int]) -> Sequence[str | None]:
        raise DatabaseRefused('no space left', '53100', True)

    database.answer = refuse
    with database.waiting([1, 2, 3]) as futures:
        pass
    errors = [future.exception(30) for future in futures]
    assert [(type(error), vars(error)) for error in errors] == [
        (DatabaseRefused, {'sqlstate': '53100', 'pause': True, 'sent': False})
    ] * 3
    assert len(database.batches) == 2


def test_what_the_group_leaves_open_is_asked_for_by_itself(database: Database) -> None:
    database.answer = lambda items: [None if item == 2 else 'done' for item in items]
    with database.waiting([1, 2, 3]) as futures:
        pass
    assert [future.result(30) for future in futures] == ['done', 'one 2', 'done']


def test_an_outage_is_told_to_each_by_an_exception_of_its_own(database: Database) -> None:
    def fail(items: Sequence[int]) -> Sequence[str | None]:
        raise StoreTimeout('too long')

    database.answer = fail
    with database.waiting([1, 2, 3]) as futures:
        pass
    errors = [future.exception(30) for future in futures]
    assert [(type(error), str(error)) for error in errors] == [(StoreTimeout, 'too long')] * 3
    assert len({id(error) for error in errors}) == 3
    assert len(database.batches) == 2, 'nobody knows what became of it: it is not asked for again'


def test_a_sender_that_is_struck_tells_the_others_that_nobody_knows(database: Database) -> None:
    def strike(items: Sequence[int]) -> Sequence[str | None]:
        raise KeyboardInterrupt

    database.answer = strike
    with database.waiting([1, 2, 3]) as futures:
        pass
    errors = [future.exception(30) for future in futures]
    assert sorted(type(error).__name__ for error in errors) == [
        'DatabaseUnavailable',
        'DatabaseUnavailable',
        'KeyboardInterrupt',
    ]
    assert database.commit.send(4) == 'one 4'


def test_a_lone_caller_that_fails_leaves_the_way_free(database: Database) -> None:
    def fail(item: int) -> str:
        raise ValueError(item)

    database.commit._one = fail
    with pytest.raises(ValueError, match='7'):
        database.commit.send(7)
    database.commit._one = database.one
    assert database.commit.send(8) == 'one 8'


def test_what_a_struck_caller_wanted_is_not_sent(database: Database) -> None:
    with database.waiting([1, 3]) as futures:
        struck, ended = [], threading.Event()

        def wait() -> None:
            try:
                database.commit.send(2)
            except KeyboardInterrupt:
                struck.append(2)
            ended.set()

        # The interpreter delivers such an exception when the lock is acquired or the wait for it
        # ends.
        group_commit._PATIENCE_SEC = 0.5
        thread = threading.Thread(target=wait)
        thread.start()
        eventually(lambda: database.commit.waiting == 3)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(
            ctypes.c_ulong(thread.ident or 0), ctypes.py_object(KeyboardInterrupt)
        )
        assert ended.wait(30)
        thread.join(30)
        assert struck == [2]
    assert [future.result(30) for future in futures] == ['many 1', 'many 3']
    assert not any(2 in group for group in database.batches)


def test_a_sender_that_never_completes_keeps_nobody_for_ever(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    database.commit._limit = 0.05
    complete = GroupCommit._complete
    monkeypatch.setattr(
        GroupCommit, '_complete', lambda *args: complete(*args) if len(args[2]) == 1 else None
    )
    with database.waiting([]), ThreadPoolExecutor(2) as pool:
        monkeypatch.setattr(group_commit, '_PATIENCE_SEC', 0.5)
        futures = [pool.submit(database.commit.send, item) for item in (1, 2)]
        assert [type(future.exception(30)) for future in futures] == [StoreTimeout, StoreTimeout]
    assert sorted(database.batches[1]) == [1, 2]
    assert database.commit.send(3) == 'one 3'


@pytest.mark.parametrize('seed', range(4))
def test_under_load_each_item_is_sent_once_and_each_caller_gets_its_own(
    monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    rng = random.Random(seed)
    sent: list[int] = []
    sizes: list[int] = []

    def one(item: int) -> str:
        time.sleep(rng.random() * 0.001)
        sent.append(item)
        return str(item)

    def many(items: Sequence[int]) -> Sequence[str | None]:
        sizes.append(len(items))
        time.sleep(rng.random() * 0.002)
        if rng.random() < 0.05:
            raise DatabaseUnavailable
        done = [item for item in items if rng.random() < 0.9]
        sent.extend(done)
        return [str(item) if item in done else None for item in items]

    monkeypatch.setattr(group_commit, '_PATIENCE_SEC', rng.choice([0.0005, 0.005]))
    commit = Commit(one, many, 30)
    failed: list[int] = []

    def call(item: int) -> None:
        try:
            assert commit.send(item) == str(item)
        except DatabaseUnavailable:
            failed.append(item)

    with ThreadPoolExecutor(16) as pool:
        for future in [pool.submit(call, item) for item in range(2000)]:
            future.result(60)
    assert sorted(sent + failed) == list(range(2000))
    assert max(sizes) > 2 and not commit.waiting
