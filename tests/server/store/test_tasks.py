"""Claims and audits: one node takes a task for a date, whoever else tries, at whatever moment the
token moves.
"""

from __future__ import annotations

import datetime
import threading
from collections.abc import Iterator

import pytest

from jobsync_core import clock
from jobsync_core.agent.task_claims import TaskClaims
from jobsync_core.assignment.tokens import TokenSet
from jobsync_core.config import CoordinationConfig
from jobsync_core.errors import ClaimLost, LockNotAvailable
from jobsync_core.protocol.ownership import Ownership
from jobsync_core.store.tasks import TaskStore
from tests.support.rows import Rows, rows_of
from tests.support.waiting import eventually

TODAY = datetime.date(2026, 3, 1)
TOMORROW = datetime.date(2026, 3, 2)


@pytest.fixture
def rows(config: CoordinationConfig) -> Iterator[Rows]:
    with rows_of(config) as found:
        found.node('a')
        found.node('b')
        found.own(0, 5_000, 'a')
        found.own(5_000, 10_000, 'b')
        yield found


def claim(
    rows: Rows,
    node: str,
    *wanted: tuple[str, int],
    life: str | None = None,
    date: datetime.date = TODAY,
) -> list[str]:
    with rows.sessions.session() as connection:
        return TaskStore(connection, rows.tables).claim(
            node, life or f'life of {node}', date, wanted
        )


def audit(rows: Rows, node: str, *texts: str) -> None:
    with rows.sessions.session() as connection:
        TaskStore(connection, rows.tables).audit(node, TODAY, [(text, 0) for text in texts])


def taken(rows: Rows, node: str, text: str, date: datetime.date = TODAY) -> bool:
    with rows.sessions.session() as connection:
        return TaskStore(connection, rows.tables).is_taken(node, date, text)


def move(rows: Rows, lo: int, hi: int, node: str) -> None:
    rows.run(
        f'UPDATE {rows.tables.assignment} SET node = %s WHERE tokens = int4range(%s, %s)',
        node,
        lo,
        hi,
    )


class TestClaim:
    def test_the_owner_gets_its_tasks_and_not_those_of_others(self, rows: Rows) -> None:
        assert claim(rows, 'a', ('mine', 0), ('last', 4_999), ('theirs', 5_000)) == ['last', 'mine']

    def test_a_claim_again_is_accepted_again(self, rows: Rows) -> None:
        assert claim(rows, 'a', ('t', 1)) == claim(rows, 'a', ('t', 1), ('t', 1)) == ['t']

    def test_a_former_life_is_refused(self, rows: Rows) -> None:
        assert claim(rows, 'a', ('t', 1), life='a former one') == []

    def test_a_claim_outlives_the_hand_over_of_its_token(self, rows: Rows) -> None:
        claim(rows, 'a', ('t', 1))
        move(rows, 0, 5_000, 'b')
        assert claim(rows, 'b', ('t', 1)) == []
        assert claim(rows, 'a', ('t', 1)) == ['t']
        assert claim(rows, 'a', ('other', 1)) == []

    def test_the_claim_of_a_dead_node_is_replaced(self, rows: Rows) -> None:
        claim(rows, 'a', ('t', 1))
        move(rows, 0, 5_000, 'b')
        rows.run(f'DELETE FROM {rows.tables.node} WHERE name = %s', 'a')
        assert claim(rows, 'b', ('t', 1)) == ['t']
        assert rows.run(f'SELECT node, incarnation, token FROM {rows.tables.claim}') == [
            ('b', 'life of b', 1)
        ]

    def test_the_claim_of_a_former_life_is_replaced(self, rows: Rows) -> None:
        claim(rows, 'a', ('t', 1))
        rows.run(f"UPDATE {rows.tables.node} SET incarnation = 'second' WHERE name = 'a'")
        assert claim(rows, 'a', ('t', 1)) == []
        assert claim(rows, 'a', ('t', 1), life='second') == ['t']

    def test_what_is_audited_is_refused_to_everybody_for_that_date(self, rows: Rows) -> None:
        claim(rows, 'a', ('t', 1))
        audit(rows, 'a', 't')
        assert claim(rows, 'a', ('t', 1)) == []
        move(rows, 0, 5_000, 'b')
        assert claim(rows, 'b', ('t', 1)) == []
        assert claim(rows, 'b', ('t', 1), date=TOMORROW) == ['t']

    def test_dates_do_not_see_each_other(self, rows: Rows) -> None:
        assert claim(rows, 'a', ('t', 1)) == ['t']
        assert claim(rows, 'a', ('t', 1), date=TOMORROW) == ['t']

    def test_it_is_durable_when_it_returns(self, rows: Rows) -> None:
        with rows.sessions.session() as connection:
            TaskStore(connection, rows.tables).claim('a', 'life of a', TODAY, [('t', 1)])
            connection.rollback()
        assert taken(rows, 'b', 't')

    def test_within_a_transaction_it_is_part_of_it(self, rows: Rows) -> None:
        with rows.sessions.session() as connection:
            with connection.cursor() as cursor:
                cursor.execute('SELECT 1')
            assert TaskStore(connection, rows.tables).claim(
                'a', 'life of a', TODAY, [('t', 1)]
            ) == ['t']
            connection.rollback()
        assert not taken(rows, 'b', 't')

    def test_nothing_is_nothing(self, rows: Rows) -> None:
        assert claim(rows, 'a') == []


class TestMovingTokens:
    """I1 for tasks: the hand-over and the claim meet in the database, and one of them comes
    first.
    """

    def test_a_claim_that_waits_for_a_hand_over_is_refused(self, rows: Rows) -> None:
        self._race(rows, commit=True)
        assert self.accepted == [[]]

    def test_a_claim_that_waits_for_a_hand_over_which_fails_is_accepted(self, rows: Rows) -> None:
        self._race(rows, commit=False)
        assert self.accepted == [['t']]

    def _race(self, rows: Rows, commit: bool) -> None:
        self.accepted: list[list[str]] = []
        with rows.sessions.session() as giver:
            with giver.cursor() as cursor:
                cursor.execute(
                    f'UPDATE {rows.tables.assignment} SET node = %s WHERE tokens @> 1', ('b',)
                )
            thread = threading.Thread(
                target=lambda: self.accepted.append(claim(rows, 'a', ('t', 1)))
            )
            thread.start()
            eventually(lambda: rows.waiting() == 1)
            if commit:
                giver.commit()
            else:
                giver.rollback()
            thread.join()

    def test_a_claim_that_waits_for_a_plan_is_accepted_though_the_token_leaves_memory_meanwhile(
        self, rows: Rows
    ) -> None:
        local = Ownership(rows.config.total_tokens)
        local.replace(TokenSet([(0, 5_000)]))
        local.extend(clock.now() + 60)
        taken = TaskClaims(
            local, rows.sessions, rows.config, rows.tables, 'a', TODAY, lambda: 'life of a'
        )
        mine = next(task for task in range(1_000) if taken.token_of(task) < 5_000)
        failures: list[ClaimLost] = []

        def take() -> None:
            assert taken.can_claim(mine)
            promised.set()
            try:
                taken.add(mine)
            except ClaimLost as error:
                failures.append(error)

        promised = threading.Event()
        thread = threading.Thread(target=take)
        with rows.sessions.session() as leader, leader.cursor() as cursor:
            cursor.execute(f'DELETE FROM {rows.tables.assignment} WHERE node = %s', ('a',))
            cursor.execute(
                f'INSERT INTO {rows.tables.assignment} (tokens, node, moving, moving_to, version) '
                "VALUES (int4range(0, 5000), 'a', true, 'b', 2)"
            )
            thread.start()
            assert promised.wait(10)
            eventually(lambda: rows.waiting() == 1)
            local.replace(TokenSet())
            leader.commit()
            thread.join()
        assert failures == []
        assert rows.run(f'SELECT node, task_id FROM {rows.tables.claim}') == [('a', str(mine))]

    def test_a_hand_over_waits_for_a_claim_and_the_new_owner_sees_it(self, rows: Rows) -> None:
        with rows.sessions.session() as taker:
            with taker.cursor() as cursor:
                cursor.execute('SELECT 1')
            assert TaskStore(taker, rows.tables).claim('a', 'life of a', TODAY, [('t', 1)]) == ['t']
            with rows.sessions.session() as giver, giver.cursor() as cursor:
                cursor.execute("SET LOCAL lock_timeout = '100ms'")
                with pytest.raises(LockNotAvailable):
                    cursor.execute(
                        f'UPDATE {rows.tables.assignment} SET node = %s WHERE tokens @> 1', ('b',)
                    )
                giver.rollback()
        move(rows, 0, 5_000, 'b')
        assert taken(rows, 'b', 't')

    def test_a_claim_that_waits_for_the_old_owners_audit_is_refused(self, rows: Rows) -> None:
        claim(rows, 'a', ('t', 1))
        move(rows, 0, 5_000, 'b')
        accepted: list[list[str]] = []
        with rows.sessions.session() as auditor:
            TaskStore(auditor, rows.tables).audit('a', TODAY, [('t', 0)])
            thread = threading.Thread(target=lambda: accepted.append(claim(rows, 'b', ('t', 1))))
            thread.start()
            eventually(lambda: rows.waiting() == 1)
            auditor.commit()
            thread.join()
        assert accepted == [[]]
        assert rows.run(f'SELECT * FROM {rows.tables.claim}') == []


class TestAudit:
    def test_it_replaces_the_claim(self, rows: Rows) -> None:
        claim(rows, 'a', ('t', 1), ('u', 2))
        audit(rows, 'a', 't')
        assert rows.run(f'SELECT task_id FROM {rows.tables.claim}') == [('u',)]
        with rows.sessions.session() as connection:
            assert TaskStore(connection, rows.tables).get_audit(TODAY) == [
                {'node': 'a', 'task_id': 't'}
            ]
            assert TaskStore(connection, rows.tables).get_audit(TOMORROW) == []

    def test_a_second_time_changes_nothing(self, rows: Rows) -> None:
        audit(rows, 'a', 't')
        audit(rows, 'a', 't', 't')
        audit(rows, 'a')
        assert rows.value(f'SELECT count(*) FROM {rows.tables.audit}') == 1

    def test_the_claims_of_others_stay(self, rows: Rows) -> None:
        claim(rows, 'b', ('t', 6_000))
        audit(rows, 'a', 't')
        assert rows.value(f'SELECT node FROM {rows.tables.claim}') == 'b'


class TestTaken:
    def test_by_an_audit_of_anybody(self, rows: Rows) -> None:
        audit(rows, 'a', 't')
        assert taken(rows, 'a', 't')
        assert taken(rows, 'b', 't')
        assert not taken(rows, 'a', 't', TOMORROW)

    def test_by_the_claim_of_another_live_node_only(self, rows: Rows) -> None:
        claim(rows, 'a', ('t', 1))
        assert taken(rows, 'b', 't')
        assert not taken(rows, 'a', 't')
        rows.run(f"UPDATE {rows.tables.node} SET incarnation = 'second' WHERE name = 'a'")
        assert not taken(rows, 'b', 't')

    def test_released_claims_are_free_and_another_lifes_stay(self, rows: Rows) -> None:
        claim(rows, 'a', ('t', 1))
        with rows.sessions.session() as connection:
            TaskStore(connection, rows.tables).release_claims('a', 'a former one')
        assert taken(rows, 'b', 't')
        with rows.sessions.session() as connection:
            TaskStore(connection, rows.tables).release_claims('a', 'life of a')
        assert not taken(rows, 'b', 't')


class TestChildren:
    def test_what_a_child_took_is_audited_and_not_released(self, rows: Rows) -> None:
        with rows.sessions.session() as connection:
            TaskStore(connection, rows.tables).claim('a', 'life of a', TODAY, [('mine', 1)])
            TaskStore(connection, rows.tables).claim(
                'a', 'life of a', TODAY, [('of a child', 2), ('of another', 3)], 77
            )
            TaskStore(connection, rows.tables).claim(
                'a', 'life of a', TODAY, [('of another', 3)], 78
            )
            assert TaskStore(connection, rows.tables).release_claims('a', 'life of a') == 1
            assert (
                TaskStore(connection, rows.tables).audit_children('a', 'a former life', TODAY) == 0
            )
            assert (
                TaskStore(connection, rows.tables).audit_children('a', 'life of a', TODAY, 78) == 1
            )
            assert (
                rows.run(f'SELECT task_id, node FROM {rows.tables.audit}') == []
            )  # not committed yet
            assert TaskStore(connection, rows.tables).audit_children('a', 'life of a', TODAY) == 1
        assert rows.run(f'SELECT task_id, node FROM {rows.tables.audit} ORDER BY 1') == [
            ('of a child', 'a'),
            ('of another', 'a'),
        ]
        assert rows.run(f'SELECT task_id FROM {rows.tables.claim}') == []

    def test_the_claims_of_a_child_are_released_by_name(self, rows: Rows) -> None:
        with rows.sessions.session() as connection:
            TaskStore(connection, rows.tables).claim(
                'a', 'life of a', TODAY, [('t', 1), ('u', 2)], 77
            )
            assert TaskStore(connection, rows.tables).release_claims('a', 'life of a', ['t']) == 1
        assert rows.run(f'SELECT task_id FROM {rows.tables.claim}') == [('u',)]


class TestPromises:
    """What a hand-over recorded because the old owner had just said yes."""

    @staticmethod
    def promise(rows: Rows, text: str, age: str = '0 seconds') -> None:
        rows.run(
            f'INSERT INTO {rows.tables.claim} (node, task_id, created_on, date, token, '
            'incarnation, promised) '
            'VALUES (%s, %s, now() - %s::interval, %s, 5000, %s, true)',
            'a',
            text,
            age,
            TODAY,
            'life of a',
        )

    @staticmethod
    def take_back(rows: Rows, text: str, life: str = 'life of a') -> bool:
        with rows.sessions.session() as connection:
            return TaskStore(connection, rows.tables).release_promise('a', life, TODAY, text)

    def test_a_promise_keeps_the_new_owner_away_until_it_is_taken_back(self, rows: Rows) -> None:
        self.promise(rows, 't')
        assert taken(rows, 'b', 't')
        assert claim(rows, 'b', ('t', 5_000)) == []
        assert self.take_back(rows, 't')
        assert not taken(rows, 'b', 't')
        assert claim(rows, 'b', ('t', 5_000)) == ['t']
        assert not self.take_back(rows, 't')

    def test_a_promise_that_became_a_claim_is_not_taken_back(self, rows: Rows) -> None:
        self.promise(rows, 't')
        assert claim(rows, 'a', ('t', 5_000)) == ['t']
        assert not self.take_back(rows, 't')
        assert taken(rows, 'b', 't')

    def test_another_life_takes_nothing_back(self, rows: Rows) -> None:
        self.promise(rows, 't')
        assert not self.take_back(rows, 't', life='a former one')
        assert taken(rows, 'b', 't')
