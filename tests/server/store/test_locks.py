"""The lock table: what counts as a change, who may clear what, and what a burst of locks costs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from jobsync_core.config import CoordinationConfig
from jobsync_core.errors import ConfigurationError
from jobsync_core.results import LockInfo
from jobsync_core.store.connection import Connection
from jobsync_core.store.locks import LockStore
from tests.support.rows import Rows, rows_of
from tests.support.waiting import eventually


@pytest.fixture
def rows(config: CoordinationConfig) -> Iterator[Rows]:
    with rows_of(config) as found:
        yield found


def register(
    rows: Rows, *locked: tuple[str, tuple[str, ...], str | None, float | None], by: str = 'a'
) -> int:
    with rows.sessions.session() as connection:
        return LockStore(connection, rows.tables).register([(*row, None) for row in locked], by)


def listed(rows: Rows) -> dict[str, LockInfo]:
    with rows.sessions.session() as connection:
        return {lock['task_id']: lock for lock in LockStore(connection, rows.tables).list_locks()}


def listen(listener: Connection, heard: list[str]) -> bool:
    heard += listener.notifies()
    return 'end' in heard


class TestRegister:
    def test_a_lock_is_listed_with_everything_that_was_given(self, rows: Rows) -> None:
        assert register(rows, ('t', ('gpu-1', '%-gpu'), 'needs a gpu', 2.0)) == 1
        lock = listed(rows)['t']
        assert lock['node_patterns'] == ['gpu-1', '%-gpu']
        assert (lock['reason'], lock['created_by']) == ('needs a gpu', 'a')
        assert (lock['expires_at'] - lock['created_at']).total_seconds() == 2 * 86400  # type: ignore[operator]

    def test_a_second_registration_replaces_all_but_the_age(self, rows: Rows) -> None:
        register(rows, ('t', ('a',), 'old', 1.0), by='a')
        first = listed(rows)['t']
        register(rows, ('t', ('b',), None, None), by='b')
        second = listed(rows)['t']
        assert (
            second['node_patterns'],
            second['reason'],
            second['created_by'],
            second['expires_at'],
        ) == (['b'], None, 'b', None)
        assert second['created_at'] == first['created_at']

    def test_the_last_of_several_rows_for_one_task_counts(self, rows: Rows) -> None:
        assert (
            register(
                rows,
                ('t', ('a',), None, None),
                ('u', ('x',), None, None),
                ('t', ('b',), None, None),
            )
            == 2
        )
        assert listed(rows)['t']['node_patterns'] == ['b']

    def test_a_new_lock_and_changed_patterns_ask_for_a_plan(self, rows: Rows) -> None:
        register(rows, ('t', ('a',), None, None))
        assert rows.lock_version == 1
        register(rows, ('t', ('a', 'b'), None, None))
        assert rows.lock_version == 2

    @pytest.mark.parametrize('pin', [True, False])
    def test_a_lock_that_becomes_a_pin_and_a_pin_that_becomes_a_lock_ask_for_a_plan(
        self, rows: Rows, pin: bool
    ) -> None:
        """Where no node of a queue group matches, a lock blocks its token and a pin does not."""
        row = ('render#3', ('gpu-%',), 'pin', None, None)
        with rows.sessions.session() as connection:
            store = LockStore(connection, rows.tables)
            store.register([row], 'a', pin=pin)
            store.register([row], 'a', pin=not pin)
            store.register([row], 'a', pin=not pin)
        assert rows.lock_version == 2

    def test_registering_the_same_again_asks_for_no_plan(self, rows: Rows) -> None:
        register(rows, ('t', ('a',), 'r', 1.0), ('u', ('b',), None, None))
        version = rows.lock_version
        register(rows, ('t', ('a',), 'r', 1.0), ('u', ('b',), None, None))
        register(rows, ('t', ('a',), 'another reason', 5.0), by='b')
        assert rows.lock_version == version

    def test_a_lock_that_has_expired_is_not_listed_and_comes_back_as_a_new_one(
        self, rows: Rows
    ) -> None:
        register(rows, ('t', ('a',), None, 1.0))
        rows.run(
            f"UPDATE {rows.tables.lock} SET expires_at = now() - interval '1 second', created_at "
            "= now() - interval '1 day'"
        )
        assert listed(rows) == {}
        register(rows, ('t', ('a',), None, 1.0))
        assert rows.lock_version == 2
        assert (
            rows.value(f"SELECT created_at > now() - interval '1 hour' FROM {rows.tables.lock}")
            is True
        )

    def test_nothing_is_written_for_no_locks(self, rows: Rows) -> None:
        assert register(rows) == 0
        assert rows.lock_version == 0

    def test_text_is_stored_as_it_was_given(self, rows: Rows) -> None:
        odd = '%s \'" \\ {} é \n;--'
        register(rows, (odd, (odd,), odd, None), by=odd)
        lock = listed(rows)[odd]
        assert (lock['node_patterns'], lock['reason'], lock['created_by']) == ([odd], odd, odd)

    def test_other_nodes_hear_of_a_change_only(self, rows: Rows) -> None:
        listener = Connection.open(rows.config, 'listener')
        try:
            listener.listen(rows.tables.channel)
            register(rows, ('t', ('a',), None, None))
            register(rows, ('t', ('a',), None, None))
            rows.run('SELECT pg_notify(%s, %s)', rows.tables.channel, 'end')
            heard: list[str] = []
            eventually(lambda: listen(listener, heard))
        finally:
            listener.close()
        assert heard == ['locks', 'end']

    def test_ten_thousand_locks_from_five_nodes_at_once_do_not_deadlock(
        self, make_config: Callable[..., CoordinationConfig]
    ) -> None:
        with rows_of(make_config(heartbeat_interval_sec=5, heartbeat_timeout_sec=60)) as rows:
            self._burst(rows)

    def _burst(self, rows: Rows) -> None:
        many = [(f'task-{number}', ('gpu-%', '%'), 'burst', None, None) for number in range(10_000)]
        failures: list[BaseException] = []

        def node(name: str) -> None:
            try:
                with rows.sessions.session() as connection:
                    LockStore(connection, rows.tables).clear_by_creator(name)
                    LockStore(connection, rows.tables).register(
                        many if name < 'n3' else many[::-1], name
                    )
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=node, args=(f'n{number}',)) for number in range(5)]
        begun = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        print(f'five nodes, 10,000 locks each: {time.perf_counter() - begun:.2f} s')
        assert failures == []
        assert rows.value(f'SELECT count(*) FROM {rows.tables.lock}') == 10_000
        assert rows.lock_version == 1


class TestLeadersRound:
    def test_a_change_waits_for_a_round_under_way_and_is_not_mistaken_for_planned(
        self, rows: Rows
    ) -> None:
        with rows.sessions.session() as leader:
            with leader.cursor() as cursor:
                cursor.execute('SELECT pg_advisory_xact_lock(%s, %s)', rows.tables.advisory)
            thread = threading.Thread(target=register, args=(rows, ('t', ('a',), None, None)))
            thread.start()
            eventually(lambda: rows.waiting() == 1)
            assert rows.lock_version == 0
            assert listed(rows) == {}
            leader.commit()
            thread.join()
        assert rows.lock_version == 1
        assert set(listed(rows)) == {'t'}

    def test_registering_what_is_there_waits_for_nobody(self, rows: Rows) -> None:
        register(rows, ('t', ('a',), None, None))
        with rows.sessions.session() as leader, leader.cursor() as cursor:
            cursor.execute('SELECT pg_advisory_xact_lock(%s, %s)', rows.tables.advisory)
            assert register(rows, ('t', ('a',), None, None)) == 1


class TestClear:
    def test_only_the_creators_locks_go(self, rows: Rows) -> None:
        register(rows, ('t', ('a',), None, None), by='a')
        register(rows, ('u', ('a',), None, None), by='b')
        with rows.sessions.session() as connection:
            assert LockStore(connection, rows.tables).clear_by_creator('a') == 1
        assert set(listed(rows)) == {'u'}
        assert rows.lock_version == 3

    def test_only_the_named_tasks_go(self, rows: Rows) -> None:
        register(rows, *((name, ('a',), None, None) for name in 'tuv'))
        with rows.sessions.session() as connection:
            assert LockStore(connection, rows.tables).clear_tasks(['t', 'v', 'nothing']) == 2
        assert set(listed(rows)) == {'u'}

    def test_locks_of_tasks_that_are_pinned_no_longer_go(self, rows: Rows) -> None:
        tasks = 'shop.pay', 'shop.pay#1', 'shop.render'
        with rows.sessions.session() as connection:
            pins = [
                (f'{task}#{slot}', ('%gpu',), 'pin', None, None)
                for task in tasks
                for slot in (3, 12)
            ]
            LockStore(connection, rows.tables).register(pins, 'worker', pin=True)
        # A user's own, whatever its reason says.
        register(rows, ('shop.pay#5', ('%gpu',), 'pin', None), ('shop.pay', ('%gpu',), 'pin', None))
        with rows.sessions.session() as connection:
            assert (
                LockStore(connection, rows.tables).clear_old_pins(['shop.pay', 'shop.other']) == 2
            )
        assert set(listed(rows)) == {
            'shop.pay#1#3',
            'shop.pay#1#12',
            'shop.render#3',
            'shop.render#12',
            'shop.pay#5',
            'shop.pay',
        }

    def test_all_go(self, rows: Rows) -> None:
        register(rows, *((name, ('a',), None, None) for name in 'tuv'))
        with rows.sessions.session() as connection:
            assert LockStore(connection, rows.tables).clear_all() == 3
        assert listed(rows) == {}

    def test_clearing_nothing_asks_for_no_plan(self, rows: Rows) -> None:
        with rows.sessions.session() as connection:
            assert LockStore(connection, rows.tables).clear_all() == 0
            assert LockStore(connection, rows.tables).clear_tasks([]) == 0
            assert LockStore(connection, rows.tables).clear_by_creator('nobody') == 0
        assert rows.lock_version == 0


def test_more_locks_than_a_plan_can_bear_are_refused_and_none_of_them_is_registered(
    rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr('jobsync_core.store.locks.LOCKS', 5)
    with rows.sessions.session() as connection:
        LockStore(connection, rows.tables).register(
            [(f't{n}', ('a',), None, None, None) for n in range(5)], 'x'
        )
    with (
        pytest.raises(ConfigurationError, match='would be 6 locks, 5 at most'),
        rows.sessions.session() as connection,
    ):
        LockStore(connection, rows.tables).register([('more', ('a',), None, None, None)], 'x')
    with rows.sessions.session() as connection:
        LockStore(connection, rows.tables).register([('t1', ('b',), None, None, None)], 'x')
    assert rows.value(f'SELECT count(*) FROM {rows.tables.lock}') == 5
