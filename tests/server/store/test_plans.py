"""Plans of many rows: written in pieces, each of which finds what the plan was made from, or is not
written.
"""

from __future__ import annotations

import datetime
import itertools
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from jobsync_core import CoordinationConfig, Job
from jobsync_core.assignment.model import Segment
from jobsync_core.assignment.round import decide
from jobsync_core.process import Process
from jobsync_core.protocol.messages.handover import Give, Refresh
from jobsync_core.protocol.messages.leadership import Lead, Observe, RoundReply
from jobsync_core.protocol.messages.membership import Join, Leave
from jobsync_core.store import leading, plans
from jobsync_core.store.cluster import ClusterStore
from jobsync_core.store.connection import Connection
from jobsync_core.store.leading import Portions
from jobsync_core.store.locks import LockStore
from jobsync_core.store.pins import PinReader
from jobsync_core.store.plans import cut
from jobsync_core.store.status import StatusStore
from tests.support.cluster import node_of
from tests.support.rows import Rows, rows_of
from tests.support.waiting import eventually

TOKENS = 100_000
PROCESS = Process('here', 'boot', 'ns', 7, '99')


class Leader:
    """A cluster of three nodes, asked through one connection, with 3,000 locks and pieces of 500
    rows.
    """

    def __init__(self, config: CoordinationConfig, rows: Rows) -> None:
        self.config, self.rows, self.tables = config, rows, rows.tables
        self.control = ClusterStore(config, rows.tables, datetime.date(2024, 5, 6))
        self.connection = Connection.open(config, 'test')
        for name in 'abc':
            self.ask(Join(name, f'life of {name}', PROCESS, 1.0, True))
        self.lock(3000)

    def ask(self, request: Any) -> Any:
        return self.control.handle(self.connection, request)

    def lock(self, count: int) -> None:
        with self.rows.sessions.session() as connection:
            LockStore(connection, self.tables).register(
                [(f't{n}', ('abc'[n % 3],), None, None, None) for n in range(count)], 'x'
            )

    def lead(self) -> RoundReply:
        led = self.ask(Lead('a', 'life of a', (), 'test'))
        assert isinstance(led, RoundReply)
        return led

    def finish(self) -> RoundReply:
        while True:
            led = self.lead()
            if not led.more:
                return led

    def assignment(self) -> list[Segment]:
        with self.rows.sessions.session() as connection:
            return StatusStore(connection, self.tables).assignment()

    def give_all(self, name: str) -> None:
        seen = self.ask(Refresh(name, f'life of {name}'))
        self.ask(
            Give(
                name,
                f'life of {name}',
                tuple((s.lo, s.hi) for s in seen.segments if s.moving),
                seen.version,
            )
        )

    @property
    def stale(self) -> bool:
        return bool(self.ask(Observe()).stale)

    def check(self) -> None:
        """Every token has one owner, and each locked one an eligible one."""
        rows = self.assignment()
        assert [row.lo for row in rows] == [0, *(row.hi for row in rows[:-1])]
        assert rows[-1].hi == TOKENS
        live = {member.name for member in self.ask(Observe()).members}
        assert {row.node for row in rows if not row.blocked} <= live


@pytest.fixture
def leader(make_config: Callable[..., CoordinationConfig]) -> Iterator[Leader]:
    config = make_config(total_tokens=TOKENS, heartbeat_interval_sec=5, heartbeat_timeout_sec=15)
    with rows_of(config) as rows:
        leader = Leader(config, rows)
        # One piece of the plan for each request, so that a test can come in between.
        leader.control.leader.portions = Portions(0.0, rows=500, fewest=500, most=500)
        yield leader
        leader.connection.close()


def test_a_plan_of_many_rows_is_written_in_pieces_and_counts_as_made_after_the_last(
    leader: Leader,
) -> None:
    assert leader.lead().more  # read and computed
    count = 0
    while (led := leader.lead()).more:
        count += 1
        assert leader.stale
        assert len(leader.assignment()) <= 500 * count + 1
    assert count > 3
    assert led.moved == TOKENS and led.blocked == 0
    assert not leader.stale
    leader.check()


def test_a_node_that_joins_amid_the_pieces_is_planned_for(leader: Leader) -> None:
    leader.lead()
    leader.lead()
    leader.ask(Join('d', 'life of d', PROCESS, 1.0, True))
    leader.finish()
    leader.check()
    assert {row.moving_to or row.node for row in leader.assignment()} == {'a', 'b', 'c', 'd'}


def test_a_node_that_leaves_amid_the_pieces_is_given_nothing(leader: Leader) -> None:
    leader.lead()
    leader.lead()
    leader.ask(Leave('b', 'life of b'))
    leader.finish()
    leader.check()
    assert {row.node for row in leader.assignment()} == {'a', 'c', None}


def test_locks_that_come_amid_the_pieces_count(leader: Leader) -> None:
    leader.lead()
    leader.lead()
    leader.lock(3001)
    leader.finish()
    assert not leader.stale
    leader.check()


def test_states_that_change_back_amid_the_pieces_do_not_make_half_a_plan_whole(
    leader: Leader,
) -> None:
    leader.finish()
    leader.rows.run(f"UPDATE {leader.tables.node} SET state = 'draining' WHERE name = 'b'")
    leader.lead()
    assert leader.lead().more
    leader.rows.run(f"UPDATE {leader.tables.node} SET state = 'active' WHERE name = 'b'")
    assert leader.stale
    leader.finish()
    for name in 'abc':
        leader.give_all(name)
    assert (
        leader.rows.value(
            f'SELECT sum(upper(tokens) - lower(tokens)) FROM {leader.tables.assignment} WHERE '
            "node = 'b'"
        )
        > TOKENS // 4
    )


def test_rows_that_were_given_away_amid_the_pieces_are_not_given_back(leader: Leader) -> None:
    """The fence of `_SAME`: a piece replaces only rows that still are as the plan saw them."""
    leader.finish()
    leader.ask(Join('d', 'life of d', PROCESS, 1.0, True))
    leader.finish()  # d's share is marked as moving
    leader.rows.run(f"UPDATE {leader.tables.node} SET state = 'draining' WHERE name = 'd'")
    leader.lead()  # read and computed: what moves to d is to stay
    for name in 'abc':
        leader.give_all(name)
    owned = [(row.lo, row.hi) for row in leader.assignment() if row.node == 'd']
    assert owned
    leader.finish()
    # d is alive: it alone may give the tokens away.
    rows = leader.assignment()
    for lo, hi in owned:
        assert {row.node for row in rows if row.lo < hi and row.hi > lo} == {'d'}
    leader.check()


def test_a_piece_stamps_its_rows_with_a_version_that_nobody_has_seen(leader: Leader) -> None:
    leader.lead()
    leader.rows.run(f'UPDATE {leader.tables.cluster} SET version = version + 100')
    before = leader.ask(Observe()).version
    leader.lead()
    assert {row.version for row in leader.assignment()} == {before + 1}
    assert leader.ask(Observe()).version == before + 1


def test_since_when_a_node_has_owned_a_token_survives_the_cutting_of_its_row(
    leader: Leader,
) -> None:
    with leader.rows.sessions.session() as connection:
        LockStore(connection, leader.tables).clear_all()
    leader.finish()
    leader.rows.run(f"UPDATE {leader.tables.assignment} SET assigned_at = '2020-01-01'")
    leader.lock(3000)
    leader.finish()
    assert (
        leader.rows.value(f'SELECT count(*) FROM {leader.tables.assignment} WHERE NOT moving') > 100
    )
    # Nothing has changed hands yet.
    assert (
        leader.rows.value(
            f"SELECT count(*) FROM {leader.tables.assignment} WHERE assigned_at > '2020-01-02'"
        )
        == 0
    )


def test_an_error_amid_the_pieces_is_tried_again_with_smaller_ones(
    leader: Leader, monkeypatch: pytest.MonkeyPatch
) -> None:
    leader.control.leader.portions.fewest = 10
    leader.lead()
    with monkeypatch.context() as patch:
        patch.setattr(plans.Draft, '_conclude', lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            leader.lead()
    assert leader.assignment() == []
    leader.lead()
    leader.lead()
    assert len(leader.assignment()) == 125
    leader.finish()
    leader.check()


def test_bad_rows_of_the_lock_table_are_set_aside_and_named_once(leader: Leader) -> None:
    bad = [
        '{"a": 1}',
        '[null]',
        '[1]',
        '[]',
        '"x\\\\"',
        '[[["a"]]]',
        '["' + 'x' * 2000 + '"]',
        '["' + '%' * 2_000_000 + '"]',
    ]
    for number, text in enumerate(bad):
        leader.rows.run(
            f'INSERT INTO {leader.tables.lock} (task_id, node_patterns) VALUES (%s, %s::jsonb)',
            f'bad {number}',
            text,
        )
    leader.rows.run(
        f"INSERT INTO {leader.tables.lock} (task_id, node_patterns) VALUES (repeat('x', 2001), "
        '\'["a"]\')'
    )
    leader.rows.run(f'UPDATE {leader.tables.cluster} SET lock_version = lock_version + 1')
    said = leader.finish().conflicts
    assert sum('is ignored' in text for text in said) == 9
    assert all(len(text) < 1000 for text in said)
    leader.check()
    leader.ask(Join('d', 'life of d', PROCESS, 1.0, True))
    assert not [text for text in leader.finish().conflicts if 'is ignored' in text]


@pytest.mark.parametrize('at_once', [0, 20_000])
def test_of_more_locks_than_there_may_be_the_first_count_and_the_leader_says_so(
    leader: Leader, at_once: int
) -> None:
    leader.control.leader.portions.at_once = at_once
    leader.control.leader.locks = PinReader(leader.tables, page=1000, most=2500)
    led = leader.finish()
    assert any(
        'more than 2,500 locks' in text and 'locks clear' in text for text in led.conflicts
    ), led.conflicts
    leader.check()
    counted = sorted(f't{n}' for n in range(3000))[:2500]
    assert [
        pin.task_id for pin in sorted(leader.control.leader.locks.pins, key=lambda pin: pin.task_id)
    ] == counted


def test_locks_are_read_on_from_where_a_request_had_to_end(leader: Leader) -> None:
    tables = leader.tables
    locks = leader.control.leader.locks = PinReader(tables, page=1000)
    ((_, _, _, total, function, version, *_),) = leader.connection.execute(
        tables.sql('leader.read')
    )
    at = (version, total, function)
    assert [locks.read(leader.connection, at, 0.0) for _ in range(4)] == [False, False, False, True]
    assert len(locks.pins) == 3000
    leader.rows.run(
        f"DELETE FROM {tables.lock} WHERE task_id = 't7'; UPDATE {tables.cluster} SET "
        'lock_version = lock_version + 1'
    )
    leader.finish()
    assert len(locks.pins) == 2999


def test_a_plan_that_takes_longer_than_the_lease_costs_nobody_his_lease(
    make_config: Callable[..., CoordinationConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(heartbeat_interval_sec=0.4, heartbeat_timeout_sec=2.0)
    begun, go_on = threading.Event(), threading.Event()

    def slow(*args: Any) -> Any:
        begun.set()
        assert go_on.wait(60)
        return decide(*args)

    with Job('n1', config, wait_on_enter=0) as first:
        node_of(first).agent._control.leader.portions.at_once = 0
        monkeypatch.setattr(leading, 'decide', slow)
        first.register_lock('t', 'n1', 'a reason to plan')
        assert begun.wait(20)
        lost = threading.Event()
        until = time.monotonic() + 2 * config.heartbeat_timeout_sec
        while time.monotonic() < until:
            if not first.am_i_healthy() or len(first.my_tokens) != config.total_tokens:
                lost.set()
            go_on.wait(0.05)
        assert not lost.is_set()
        go_on.set()
        with Job('n2', config, wait_on_enter=0) as second:
            eventually(
                lambda: len(first.my_tokens) == len(second.my_tokens) == config.total_tokens // 2,
                timeout=20,
            )
        assert first.get_coordination_status()['evictions'] == 0


def test_any_cutting_covers_what_the_whole_does() -> None:
    rng = random.Random(7)
    for _ in range(500):
        before, after = (_rows(rng, name) for name in 'ab')
        old, new = set(before), set(after)
        gone, fresh = (
            deque(row for row in before if row not in new),
            deque(row for row in after if row not in old),
        )
        table = set(before)
        while fresh:
            piece = cut(gone, fresh, rng.randint(1, 4))
            assert set(piece.gone) <= table
            table = (table - set(piece.gone)) | set(piece.fresh)
            rows = sorted(table, key=lambda row: row.lo)
            assert all(left.hi == right.lo for left, right in itertools.pairwise(rows))
        assert not gone
        assert sorted(table, key=lambda row: row.lo) == after


def _rows(rng: random.Random, name: str) -> list[Segment]:
    bounds = [0, *sorted(rng.sample(range(1, 40), rng.randint(0, 12))), 40]
    return [
        Segment(lo, hi, rng.choice((name, 'same')), version=1)
        for lo, hi in itertools.pairwise(bounds)
    ]
