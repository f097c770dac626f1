"""Group commit: every caller gets what became of its own item, whatever happens to the one that
carries it.
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


class Carrier:
    """Carries numbers; notes in which groups, and can be held up."""

    def __init__(self) -> None:
        self.groups: list[list[int]] = []
        self.open = threading.Event()
        self.open.set()
        self.departed = threading.Event()
        self.answer: Callable[[Sequence[int]], Sequence[str | None]] = lambda items: [
            f'many {item}' for item in items
        ]
        self.commit = Commit(self.one, self.many, 30)

    def one(self, item: int) -> str:
        self.groups.append([item])
        self.departed.set()
        assert self.open.wait(30)
        return f'one {item}'

    def many(self, items: Sequence[int]) -> Sequence[str | None]:
        self.groups.append(list(items))
        return self.answer(items)

    @contextmanager
    def waiting(self, items: Sequence[int]) -> Iterator[list[Future[str]]]:
        """Callers with these items wait for a flight; at the end of the block they have been
        carried.
        """
        self.open.clear()
        with ThreadPoolExecutor(len(items) + 1) as pool:
            first = pool.submit(self.commit.carry, 0)
            assert self.departed.wait(30)
            futures = []
            for number, item in enumerate(items):
                futures.append(pool.submit(self.commit.carry, item))
                eventually(lambda expected=number + 1: len(self.commit._waiting) == expected)  # type: ignore[misc]
            try:
                yield futures
            finally:
                self.open.set()
            assert first.result(30) == 'one 0'


@pytest.fixture
def carrier(monkeypatch: pytest.MonkeyPatch) -> Carrier:
    monkeypatch.setattr(group_commit, '_PATIENCE_SEC', 30.0)
    return Carrier()


def test_a_lone_caller_goes_at_once_and_by_itself(carrier: Carrier) -> None:
    assert [carrier.commit.carry(item) for item in (1, 2)] == ['one 1', 'one 2']
    assert carrier.groups == [[1], [2]]


def test_those_who_come_during_a_flight_go_together_in_the_next(carrier: Carrier) -> None:
    with carrier.waiting([1, 2, 3]) as futures:
        pass
    assert [future.result(30) for future in futures] == ['many 1', 'many 2', 'many 3']
    assert [sorted(group) for group in carrier.groups] == [[0], [1, 2, 3]]


def test_a_flight_that_takes_long_holds_nobody_up(
    carrier: Carrier, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ThreadPoolExecutor(2) as pool, carrier.waiting([]):
        monkeypatch.setattr(group_commit, '_PATIENCE_SEC', 0.01)
        carrier.commit._one = lambda item: f'meanwhile {item}'
        assert pool.submit(carrier.commit.carry, 1).result(30) == 'meanwhile 1'
        assert pool.submit(carrier.commit.carry, 2).result(30) == 'meanwhile 2'
        assert not carrier.open.is_set()


def test_a_waiting_caller_that_loses_patience_takes_the_others_along(
    carrier: Carrier, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ThreadPoolExecutor(3) as pool, carrier.waiting([]):
        monkeypatch.setattr(group_commit, '_PATIENCE_SEC', 2.0)
        futures = [pool.submit(carrier.commit.carry, item) for item in (1, 2, 3)]
        assert [future.result(30) for future in futures] == ['many 1', 'many 2', 'many 3']
    assert [sorted(group) for group in carrier.groups] == [[0], [1, 2, 3]]


def test_what_the_server_refuses_goes_one_by_one_so_that_the_bad_one_fails_alone(
    carrier: Carrier,
) -> None:
    def refuse(items: Sequence[int]) -> Sequence[str | None]:
        raise DatabaseRefused('2 is bad')

    def one(item: int) -> str:
        if item == 2:
            raise DatabaseRefused('2 is bad')
        return f'one {item}'

    carrier.answer = refuse
    with carrier.waiting([1, 2, 3]) as futures:
        carrier.commit._one = one
    assert (futures[0].result(30), futures[2].result(30)) == ('one 1', 'one 3')
    with pytest.raises(DatabaseRefused, match='2 is bad'):
        futures[1].result(30)


def test_a_server_that_would_refuse_all_is_not_asked_for_each(carrier: Carrier) -> None:
    def refuse(items: Sequence[int]) -> Sequence[str | None]:
        raise DatabaseRefused('no space left', '53100', True)

    carrier.answer = refuse
    with carrier.waiting([1, 2, 3]) as futures:
        pass
    errors = [future.exception(30) for future in futures]
    assert [(type(error), vars(error)) for error in errors] == [
        (DatabaseRefused, {'sqlstate': '53100', 'pause': True, 'sent': False})
    ] * 3
    assert len(carrier.groups) == 2


def test_what_the_group_leaves_open_is_asked_for_by_itself(carrier: Carrier) -> None:
    carrier.answer = lambda items: [None if item == 2 else 'done' for item in items]
    with carrier.waiting([1, 2, 3]) as futures:
        pass
    assert [future.result(30) for future in futures] == ['done', 'one 2', 'done']


def test_an_outage_is_told_to_each_by_an_exception_of_its_own(carrier: Carrier) -> None:
    def fail(items: Sequence[int]) -> Sequence[str | None]:
        raise StoreTimeout('too long')

    carrier.answer = fail
    with carrier.waiting([1, 2, 3]) as futures:
        pass
    errors = [future.exception(30) for future in futures]
    assert [(type(error), str(error)) for error in errors] == [(StoreTimeout, 'too long')] * 3
    assert len({id(error) for error in errors}) == 3
    assert len(carrier.groups) == 2, 'nobody knows what became of it, so it is not asked for again'


def test_a_carrier_that_is_struck_tells_the_others_that_nobody_knows(carrier: Carrier) -> None:
    def strike(items: Sequence[int]) -> Sequence[str | None]:
        raise KeyboardInterrupt

    carrier.answer = strike
    with carrier.waiting([1, 2, 3]) as futures:
        pass
    errors = [future.exception(30) for future in futures]
    assert sorted(type(error).__name__ for error in errors) == [
        'DatabaseUnavailable',
        'DatabaseUnavailable',
        'KeyboardInterrupt',
    ]
    assert carrier.commit.carry(4) == 'one 4'


def test_a_lone_caller_that_fails_leaves_the_way_free(carrier: Carrier) -> None:
    def fail(item: int) -> str:
        raise ValueError(item)

    carrier.commit._one = fail
    with pytest.raises(ValueError, match='7'):
        carrier.commit.carry(7)
    carrier.commit._one = carrier.one
    assert carrier.commit.carry(8) == 'one 8'


def test_what_a_struck_caller_wanted_is_not_carried(carrier: Carrier) -> None:
    with carrier.waiting([1, 3]) as futures:
        struck, ended = [], threading.Event()

        def wait() -> None:
            try:
                carrier.commit.carry(2)
            except KeyboardInterrupt:
                struck.append(2)
            ended.set()

        # The interpreter delivers such an exception when the lock is acquired or the wait for it
        # ends.
        group_commit._PATIENCE_SEC = 0.5
        thread = threading.Thread(target=wait)
        thread.start()
        eventually(lambda: len(carrier.commit._waiting) == 3)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(
            ctypes.c_ulong(thread.ident or 0), ctypes.py_object(KeyboardInterrupt)
        )
        assert ended.wait(30)
        thread.join(30)
        assert struck == [2]
    assert [future.result(30) for future in futures] == ['many 1', 'many 3']
    assert not any(2 in group for group in carrier.groups)


def test_a_carrier_that_never_lands_keeps_nobody_for_ever(
    carrier: Carrier, monkeypatch: pytest.MonkeyPatch
) -> None:
    carrier.commit._limit = 0.05
    land = GroupCommit._land
    monkeypatch.setattr(
        GroupCommit, '_land', lambda *args: land(*args) if len(args[2]) == 1 else None
    )
    with carrier.waiting([]), ThreadPoolExecutor(2) as pool:
        monkeypatch.setattr(group_commit, '_PATIENCE_SEC', 0.5)
        futures = [pool.submit(carrier.commit.carry, item) for item in (1, 2)]
        assert [type(future.exception(30)) for future in futures] == [StoreTimeout, StoreTimeout]
    assert sorted(carrier.groups[1]) == [1, 2]
    assert carrier.commit.carry(3) == 'one 3'


@pytest.mark.parametrize('seed', range(4))
def test_under_load_each_item_is_carried_once_and_each_caller_gets_its_own(
    monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    rng = random.Random(seed)
    carried: list[int] = []
    sizes: list[int] = []

    def one(item: int) -> str:
        time.sleep(rng.random() * 0.001)
        carried.append(item)
        return str(item)

    def many(items: Sequence[int]) -> Sequence[str | None]:
        sizes.append(len(items))
        time.sleep(rng.random() * 0.002)
        if rng.random() < 0.05:
            raise DatabaseUnavailable
        done = [item for item in items if rng.random() < 0.9]
        carried.extend(done)
        return [str(item) if item in done else None for item in items]

    monkeypatch.setattr(group_commit, '_PATIENCE_SEC', rng.choice([0.0005, 0.005]))
    commit = Commit(one, many, 30)
    failed: list[int] = []

    def call(item: int) -> None:
        try:
            assert commit.carry(item) == str(item)
        except DatabaseUnavailable:
            failed.append(item)

    with ThreadPoolExecutor(16) as pool:
        for future in [pool.submit(call, item) for item in range(2000)]:
            future.result(60)
    assert sorted(carried + failed) == list(range(2000))
    assert max(sizes) > 2 and not commit._waiting
