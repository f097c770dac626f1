"""Key steps of a node's life, told one request at a time."""

from __future__ import annotations

from dataclasses import replace

import pytest

from jobsync_core.assignment.model import Member, Segment
from jobsync_core.assignment.tokens import TokenSet
from jobsync_core.errors import ClusterNotFormed, ConfigMismatch, DuplicateNodeName
from jobsync_core.process import Process
from jobsync_core.protocol.effects import (
    Effect,
    Entered,
    Failed,
    Left,
    Note,
    RebalanceEvent,
    Release,
)
from jobsync_core.protocol.messages import Reply, Request
from jobsync_core.protocol.messages.connection import Connect, ConnectReply, RecordHistory
from jobsync_core.protocol.messages.handover import (
    Give,
    GiveReply,
    Refresh,
    RefreshReply,
    Take,
    TakeReply,
)
from jobsync_core.protocol.messages.leadership import (
    Evict,
    EvictReply,
    Lead,
    Observe,
    ObserveReply,
    RoundReply,
    StepDown,
)
from jobsync_core.protocol.messages.membership import (
    Activate,
    ActivateReply,
    Beat,
    Drain,
    HeartbeatReply,
    Join,
    JoinReply,
    Leave,
    Mismatch,
    Occupied,
)
from jobsync_core.protocol.messages.signs import Sign
from jobsync_core.protocol.node import Phase, Protocol, Settings
from jobsync_core.protocol.ownership import Ownership

ME, OTHER = Process('here', 'boot', 'ns', 1, 't'), Process('there', 'boot2', 'ns', 2, 't')
START = 1000.0


def unnumbered(request: Request) -> Request:
    """The request without the numbers of heartbeats."""
    if isinstance(request, Beat):
        return replace(request, number=0, seen=0)
    return replace(request, seen=0) if isinstance(request, (Refresh, RecordHistory)) else request


class Node:
    """A protocol, its clock, and the answers that a test gives it."""

    def __init__(self, **settings: float | bool) -> None:
        self.now = START
        self.lives = 0
        self.gone: set[Process] = set()
        self.ownership = Ownership(10)
        defaults: dict[str, float | bool] = {
            'interval': 5.0,
            'timeout': 15.0,
            'lease': 13.5,
            'total_tokens': 10,
        }
        self.protocol = Protocol(
            'me',
            Settings(**{**defaults, **settings}),  # type: ignore[arg-type]  # fields by name
            ME,
            self.ownership,
            new_incarnation=self._life,
            is_known_dead=self.gone.__contains__,
            promises=lambda tokens: tuple(
                (f'task-{token}', token) for token in tokens if token == 3
            ),
        )

    def _life(self) -> str:
        self.lives += 1
        return f'life-{self.lives}'

    def asks(self) -> Request | None:
        """What it sends now."""
        return self.protocol.next(self.now)

    def hears(self, request: Request, reply: Reply, after: float = 0.01) -> None:
        """It asks exactly this, but for the numbers of heartbeats, and gets that answer."""
        asked = self.asks()
        assert (unnumbered(asked) if asked is not None else None) == unnumbered(request)
        self.now += after
        self.protocol.reply(request, reply, self.now)

    def effects(self) -> list[Effect]:
        return self.protocol.take_effects()

    def passes(self, seconds: float) -> None:
        self.now += seconds

    def may_claim(self) -> list[int]:
        return [token for token in range(10) if self.ownership.may_claim(token, self.now)]

    def beat(
        self,
        version: int = 1,
        state: str = 'active',
        older: tuple[Sign, ...] = (),
        life: str = 'life-1',
    ) -> None:
        self.hears(Beat('me', life), HeartbeatReply(version, state, older))


def row(
    lo: int, hi: int, moving_to: str | None = None, *, moving: bool = False, version: int = 1
) -> Segment:
    return Segment(lo, hi, 'me', moving or moving_to is not None, moving_to, False, version)


def holdings(*rows: Segment, version: int = 1, state: str = 'active') -> RefreshReply:
    return RefreshReply(version, state, rows, True, 0)


LEADER = (Sign('leader', 'x', 1), Sign('second', 'y', 1))


def follower(**settings: float | bool) -> Node:
    """A node that has entered and owns the tokens 0 to 4; two older ones lead."""
    node = Node(**settings)
    node.hears(Connect(), ConnectReply('server'))
    node.hears(Join('me', 'life-1', ME, 1.0, False), JoinReply(0))
    node.beat(0, 'joining', LEADER)
    node.hears(Activate('me', 'life-1', 1), ActivateReply(True, 3))
    node.hears(Refresh('me', 'life-1'), holdings(row(0, 5)))
    node.hears(Take('me', ((0, 5),)), TakeReply(((0, 5),)))
    node.hears(Refresh('me', 'life-1'), holdings(row(0, 5)))
    assert node.asks() is None
    effects = node.effects()
    assert [effect for effect in effects if isinstance(effect, RebalanceEvent)] == [
        RebalanceEvent(True, 1, 5, 0)
    ]
    assert Entered() in effects
    assert node.may_claim() == [0, 1, 2, 3, 4]
    return node


def test_a_joiner_owns_nothing_while_its_grace_period_runs() -> None:
    node = Node(wait_on_enter=60.0)
    node.hears(Connect(), ConnectReply('server'))
    node.hears(Join('me', 'life-1', ME, 1.0, False), JoinReply(0))
    node.beat(0, 'joining', LEADER)
    node.hears(Refresh('me', 'life-1'), holdings(state='joining'))
    assert node.asks() is None
    assert node.protocol.phase is Phase.WAITING and not node.protocol.entered


def test_the_grace_period_ends_with_too_few_nodes_in_cluster_not_formed() -> None:
    node = Node(minimum_nodes=3)
    node.hears(Connect(), ConnectReply('server'))
    node.hears(Join('me', 'life-1', ME, 1.0, False), JoinReply(0))
    node.beat(0, 'joining')
    node.hears(Activate('me', 'life-1', 3), ActivateReply(False, 1))
    assert any(
        isinstance(effect, Failed) and isinstance(effect.error, ClusterNotFormed)
        for effect in node.effects()
    )
    node.hears(Leave('me', 'life-1'), True)
    assert node.protocol.phase is Phase.LEFT


def test_the_lease_counts_from_the_sending_of_the_heartbeat() -> None:
    node = follower()
    node.passes(5.0)
    sent = node.now
    node.hears(Beat('me', 'life-1'), HeartbeatReply(1, 'active', LEADER), after=1.5)
    assert node.ownership.deadline == sent + 13.5


def test_a_lease_that_comes_with_a_new_version_counts_when_its_rows_have_been_read() -> None:
    """Somebody may have deleted rows: their owner must not go on for longer for having heard it."""
    node = follower()
    before = node.ownership.deadline
    node.passes(5.0)
    sent = node.now
    node.beat(2, older=LEADER)
    assert node.ownership.deadline == before
    node.hears(Refresh('me', 'life-1'), holdings(row(0, 3), version=2))
    assert node.ownership.deadline == sent + 13.5 and node.may_claim() == [0, 1, 2]


def test_the_rows_of_a_new_version_are_read_before_a_long_gain_is_asked_about() -> None:
    node = follower()
    node.protocol.notified('plan 2', node.now)
    node.hears(Refresh('me', 'life-1'), holdings(row(0, 9), version=2))
    node.passes(5.0)
    node.beat(3, older=LEADER)
    node.hears(Refresh('me', 'life-1'), holdings(row(0, 9), version=3))
    assert isinstance(node.asks(), Take)


def test_without_an_answer_it_stops_claiming_before_anybody_may_call_it_dead() -> None:
    node = follower()
    last_beat = node.ownership.deadline - 13.5
    node.protocol.disconnected(node.now)
    node.now = last_beat + 13.49
    assert node.may_claim() == [0, 1, 2, 3, 4]
    node.now = last_beat + 13.5
    assert node.may_claim() == []
    node.asks()
    assert RebalanceEvent(False, 1, 0, 5) in node.effects()


def test_after_a_reconnection_it_reads_its_rows_before_its_lease_is_extended() -> None:
    node = follower()
    node.protocol.disconnected(node.now)
    node.passes(60.0)
    node.hears(Connect(), ConnectReply('server'))
    sent = node.now
    node.beat(1, 'active', LEADER)
    assert node.may_claim() == []
    node.hears(Refresh('me', 'life-1'), holdings(row(0, 2)), after=2.0)
    assert node.may_claim() == [0, 1] and node.ownership.deadline == sent + 13.5


def test_tokens_leave_the_set_before_they_are_given_away() -> None:
    node = follower()
    node.protocol.notified('plan 2', node.now)
    node.hears(
        Refresh('me', 'life-1'), holdings(row(0, 3), row(3, 5, 'second', version=2), version=2)
    )
    assert node.may_claim() == [0, 1, 2]
    node.hears(Give('me', 'life-1', ((3, 5),), 2, (('task-3', 3),)), GiveReply(2))
    assert RebalanceEvent(False, 2, 0, 2) in node.effects()


def test_on_release_holds_the_hand_over_up_and_only_so_long() -> None:
    node = follower(has_release=True, release_timeout=2.0)
    node.protocol.notified('plan 2', node.now)
    node.hears(
        Refresh('me', 'life-1'), holdings(row(0, 3), row(3, 5, 'second', version=2), version=2)
    )
    (release,) = (effect for effect in node.effects() if isinstance(effect, Release))
    assert set(release.tokens) == {3, 4} and node.may_claim() == [0, 1, 2]
    assert node.asks() is None
    node.protocol.released(release.number + 1, node.now)
    assert node.asks() is None
    node.passes(2.0)
    assert isinstance(node.asks(), Give)


def test_a_row_whose_receiver_has_gone_is_neither_claimed_nor_given() -> None:
    node = follower()
    node.protocol.notified('plan 2', node.now)
    node.hears(
        Refresh('me', 'life-1'), holdings(row(0, 3), row(3, 5, moving=True, version=2), version=2)
    )
    assert node.asks() is None
    assert node.may_claim() == [0, 1, 2]


def test_gained_tokens_are_claimed_only_after_asking_who_has_begun_their_tasks() -> None:
    node = follower()
    node.protocol.notified('give me', node.now)
    node.hears(Refresh('me', 'life-1'), holdings(row(0, 6), version=2))
    assert 5 not in node.may_claim()
    keys = node.ownership.exclusions.keys_of([(5, 'taken')])
    node.hears(Take('me', ((5, 6),), limit=20_000), TakeReply(((5, 6),), keys))
    assert 5 in node.may_claim()
    assert node.ownership.exclusions.excludes(
        5, 'taken'
    ) and not node.ownership.exclusions.excludes(5, 'free')


def test_an_evicted_node_clears_first_and_comes_back_as_somebody_new() -> None:
    node = follower()
    node.passes(40.0)
    node.hears(Beat('me', 'life-1'), None)
    assert node.may_claim() == [] and not node.ownership.tokens
    assert RebalanceEvent(False, 1, 0, 5) in node.effects()
    node.hears(Join('me', 'life-2', ME, 1.0, True), JoinReply(3))
    node.beat(3, 'active', LEADER, life='life-2')
    node.hears(Refresh('me', 'life-2'), holdings(version=3))
    assert node.may_claim() == []


@pytest.mark.parametrize('held', [False, True])
def test_a_drain_outlives_an_eviction_and_an_operators_as_such(held: bool) -> None:
    """An operator drains a node that has drained itself: it must not take part by itself."""
    node = follower()
    node.protocol.drain(node.now, by_itself=True)
    node.passes(5.0)
    node.beat(older=LEADER)
    node.hears(Drain('me', 'life-1', True, True), True)
    node.hears(Refresh('me', 'life-1'), holdings(state='draining'))
    node.passes(5.0)
    reply = HeartbeatReply(1, 'draining', LEADER, held=held)
    node.hears(Beat('me', 'life-1'), reply)
    node.passes(40.0)
    node.hears(Beat('me', 'life-1'), None)
    node.hears(Join('me', 'life-2', ME, 1.0, True), JoinReply(3))
    node.beat(3, 'active', LEADER, life='life-2')
    assert node.asks() == Drain('me', 'life-2', True, by_itself=not held)


def test_a_name_is_taken_over_when_its_sign_stood_for_a_timeout() -> None:
    node = Node()
    node.hears(Connect(), ConnectReply('server'))
    join = Join('me', 'life-1', ME, 1.0, False)
    began = node.now
    while node.now < began + 15.0:
        node.hears(join, Occupied(Sign('me', 'old', 7), OTHER))
        assert node.asks() is None
        node.now = node.protocol.wake_at
    node.hears(join, Occupied(Sign('me', 'old', 7), OTHER))
    assert node.asks() == Join('me', 'life-1', ME, 1.0, False, ('old', 7))


def test_a_name_in_use_is_refused_and_a_known_dead_one_taken_at_once() -> None:
    node = Node()
    node.hears(Connect(), ConnectReply('server'))
    node.hears(Join('me', 'life-1', ME, 1.0, False), Occupied(Sign('me', 'old', 7), OTHER))
    node.gone.add(OTHER)
    node.passes(1.0)
    node.hears(Join('me', 'life-1', ME, 1.0, False), Occupied(Sign('me', 'old', 7), OTHER))
    node.gone.clear()
    node.hears(
        Join('me', 'life-1', ME, 1.0, False, ('old', 7)), Occupied(Sign('me', 'old', 8), OTHER)
    )
    assert node.effects() == [], "one heartbeat may be a dead process's last, which came late"
    node.passes(1.0)
    node.hears(Join('me', 'life-1', ME, 1.0, False), Occupied(Sign('me', 'old', 9), OTHER))
    assert any(
        isinstance(effect, Failed) and isinstance(effect.error, DuplicateNodeName)
        for effect in node.effects()
    )
    assert node.protocol.phase is Phase.FAILED


def test_a_dead_rivals_heartbeats_come_and_go_with_the_databases_histories_and_prove_no_life() -> (
    None
):
    node = Node()
    node.hears(Connect(), ConnectReply('server'))
    for number in (
        12,
        0,
        12,
    ):  # two failovers, the first to a standby that lacks more than the second
        node.hears(Join('me', 'life-1', ME, 1.0, False), Occupied(Sign('me', 'old', number), OTHER))
        node.passes(1.0)
    assert node.effects() == [] and node.protocol.phase is Phase.JOINING


def test_other_settings_than_a_live_cluster_has_are_refused() -> None:
    node = Node()
    node.hears(Connect(), ConnectReply('server'))
    join = Join('me', 'life-1', ME, 1.0, False)
    node.hears(join, Mismatch(99, 'md5', (Sign('a', 'x', 1),)))
    assert node.asks() is None
    node.passes(1.0)
    node.hears(join, Mismatch(99, 'md5', (Sign('a', 'x', 2),)))
    node.passes(1.0)
    node.hears(join, Mismatch(99, 'md5', (Sign('a', 'x', 3),)))
    assert any(
        isinstance(effect, Failed) and isinstance(effect.error, ConfigMismatch)
        for effect in node.effects()
    )


def test_another_history_of_the_database_makes_it_wait_one_timeout_without_claiming() -> None:
    node = follower()
    node.protocol.disconnected(node.now)
    node.passes(1.0)
    node.hears(Connect(), ConnectReply('promoted'))
    assert node.may_claim() == [] and node.protocol.quarantined
    node.beat(1, 'active', LEADER)
    node.passes(14.9)
    assert node.may_claim() == [] and node.protocol.quarantined
    node.passes(0.2)
    node.beat(1, 'active', LEADER)
    node.hears(Refresh('me', 'life-1'), holdings(row(0, 5)))
    assert not node.protocol.quarantined


def test_an_activation_that_the_database_has_forgotten_is_repeated() -> None:
    node = follower()
    node.passes(5.0)
    node.beat(1, 'joining', LEADER)
    node.hears(Activate('me', 'life-1', 0), ActivateReply(True, 3))
    assert node.protocol.state == 'active'


def member(name: str, incarnation: str, beat: int, created: float, state: str = 'active') -> Member:
    return Member(name, incarnation, beat, created, state, 1.0)


def test_the_leader_looks_again_before_it_repeats_a_round_that_evicted_nobody() -> None:
    node = Node()
    node.hears(Connect(), ConnectReply('server'))
    node.hears(Join('me', 'life-1', ME, 1.0, False), JoinReply(0))
    node.beat(0, 'joining')
    node.hears(Activate('me', 'life-1', 1), ActivateReply(True, 2))
    dead = Sign('other', 'o', 4)
    table = (member('me', 'life-1', 1, 1.0), member('other', 'o', 4, 2.0))
    replies: dict[type, Reply] = {
        Observe: ObserveReply(table, 1, False, None),
        Beat: HeartbeatReply(1, 'active', ()),
        Refresh: holdings(),
        Lead: RoundReply(True, 1),
    }
    while not isinstance(request := node.asks(), Evict):
        if request is not None:
            node.protocol.reply(request, replies.get(type(request), True), node.now)
        node.now = max(node.protocol.wake_at, node.now)
    assert request.dead == (dead,) and node.now - START >= 15.0
    node.protocol.reply(request, EvictReply(True), node.now)
    assert node.asks() == Observe()
    node.protocol.reply(
        Observe(), ObserveReply((table[0], member('other', 'o', 5, 2.0)), 1, False, None), node.now
    )
    assert not isinstance(node.asks(), (Evict, Lead))


def leader() -> Node:
    """A node that has entered, leads another one, and is about to plan."""
    node = Node()
    node.hears(Connect(), ConnectReply('server'))
    node.hears(Join('me', 'life-1', ME, 1.0, False), JoinReply(0))
    node.beat(0, 'joining')
    node.hears(Activate('me', 'life-1', 1), ActivateReply(True, 2))
    node.hears(Refresh('me', 'life-1'), holdings(row(0, 5)))
    node.hears(Take('me', ((0, 5),)), TakeReply(((0, 5),)))
    node.hears(Refresh('me', 'life-1'), holdings(row(0, 5)))
    node.hears(
        Observe(),
        ObserveReply((member('me', 'life-1', 1, 1.0), member('other', 'o', 4, 2.0)), 1, True, None),
    )
    node.passes(0.3)
    return node


def test_a_refused_round_leaves_the_connection_the_lease_and_the_heartbeat_as_they_are() -> None:
    node = leader()
    round_ = node.asks()
    assert isinstance(round_, Lead)
    node.protocol.refused(round_, node.now)
    assert node.protocol.connected and node.may_claim() == [0, 1, 2, 3, 4]
    assert node.asks() is None and node.protocol.wake_at > node.now
    node.passes(0.3)
    node.hears(Refresh('me', 'life-1'), holdings(row(0, 5)))
    assert isinstance(node.asks(), Lead)


@pytest.mark.parametrize(
    ('reply', 'told'),
    [
        (
            RoundReply(True, 2, moved=7, blocked=3),
            Note('info', 'led a rebalance', {'node': 'me', 'version': 2, 'moved': 7, 'blocked': 3}),
        ),
        (
            RoundReply(True, 2, moved=10, blocked=10),  # of a queue group that nobody consumes
            Note(
                'info', 'led a rebalance', {'node': 'me', 'version': 2, 'moved': 10, 'blocked': 10}
            ),
        ),
        (
            RoundReply(True, 2, moved=10, blocked=10, for_nobody=True),
            Note(
                'info',
                'led a rebalance: no node may own any token now',
                {'node': 'me', 'version': 2, 'moved': 10, 'blocked': 10},
            ),
        ),
    ],
)
def test_a_round_that_the_node_led_is_noted(reply: RoundReply, told: Note) -> None:
    node = leader()
    node.effects()
    round_ = node.asks()
    assert isinstance(round_, Lead)
    node.protocol.reply(round_, reply, node.now)
    assert told in node.effects()


def test_whatever_was_under_way_is_dropped_after_an_unforeseen_error_and_read_anew() -> None:
    node = leader()
    assert isinstance(node.asks(), Lead)
    node.protocol.recover(node.now)
    assert node.may_claim() == []
    assert RebalanceEvent(False, 1, 0, 5) in node.effects()
    node.passes(1.0)
    node.hears(Connect(), ConnectReply('server'))
    node.beat()
    node.hears(Refresh('me', 'life-1'), holdings(row(0, 5)))
    node.hears(Take('me', ((0, 5),), limit=20_000), TakeReply(((0, 5),)))
    assert node.may_claim() == [0, 1, 2, 3, 4]


def test_a_leader_that_stepped_down_asks_at_once_for_its_new_place() -> None:
    node = leader()
    while not isinstance(request := node.asks(), StepDown):
        if isinstance(request, Lead):
            node.protocol.refused(request, node.now)
        elif request is not None:
            table = (member('me', 'life-1', 1, 1.0), member('other', 'o', round(node.now), 2.0))
            replies: dict[type, Reply] = {
                Beat: HeartbeatReply(1, 'active', ()),
                Observe: ObserveReply(table, 1, True, None),
                Refresh: holdings(row(0, 5)),
            }
            node.protocol.reply(request, replies[type(request)], node.now)
        node.now = max(node.protocol.wake_at, node.now)
    assert 15.0 <= node.now - START < 20.0
    node.protocol.reply(request, True, node.now)
    assert node.protocol.rank(node.now) is None
    node.beat(older=(Sign('other', 'o', 99),))
    assert node.protocol.rank(node.now) == 1


def heartbeat_reply(history: str, settled: bool = True, number: int = 2) -> HeartbeatReply:
    return HeartbeatReply(
        1,
        'active',
        tuple(replace(sign, beat=number) for sign in LEADER),
        history=history,
        settled=settled,
    )


def test_a_heartbeat_that_shows_another_history_extends_no_lease_and_makes_it_wait() -> None:
    node = follower()
    node.passes(5.0)
    node.hears(Beat('me', 'life-1'), heartbeat_reply('old'))
    node.passes(5.0)
    assert node.may_claim() == [0, 1, 2, 3, 4]
    node.hears(Beat('me', 'life-1'), heartbeat_reply('new', settled=False))
    noticed = node.now
    assert node.may_claim() == [] and node.protocol.quarantined
    node.passes(5.0)
    node.hears(Beat('me', 'life-1'), heartbeat_reply('new', False, 3))
    assert node.asks() is None and node.ownership.deadline == 0
    node.now = noticed + 15.1
    node.hears(Beat('me', 'life-1'), heartbeat_reply('new', False, 4))
    node.hears(Refresh('me', 'life-1'), holdings(row(0, 5)))
    node.hears(RecordHistory('me', 'life-1', 0, 'new'), True)
    node.hears(Take('me', ((0, 5),), limit=20_000), TakeReply(((0, 5),)))
    assert node.may_claim() == [0, 1, 2, 3, 4]


def test_another_history_is_waited_out_even_where_the_cluster_knows_it_already() -> None:
    node = follower()
    node.passes(5.0)
    node.hears(Beat('me', 'life-1'), heartbeat_reply('old'))
    node.passes(5.0)
    node.hears(Beat('me', 'life-1'), heartbeat_reply('new'))
    noticed = node.now
    assert node.may_claim() == [] and node.protocol.quarantined
    node.now = noticed + 15.1
    node.hears(Beat('me', 'life-1'), heartbeat_reply('new', number=3))
    node.hears(Refresh('me', 'life-1'), holdings(row(0, 2)))


def test_a_new_node_waits_where_the_cluster_does_not_know_the_history_yet() -> None:
    for settled in (False, True):
        node = Node()
        node.hears(Connect(), ConnectReply(''))
        node.hears(Join('me', 'life-1', ME, 1.0, False), JoinReply(0))
        node.hears(Beat('me', 'life-1'), heartbeat_reply('new', settled))
        assert node.protocol.quarantined is not settled


def numbers(node: Node) -> tuple[int, int]:
    """Of the heartbeat that it sends next: its own, and the one that was answered last."""
    request = node.asks()
    assert isinstance(request, Beat)
    return request.number, request.seen


def test_a_database_that_has_forgotten_the_last_answered_heartbeat_has_another_history() -> None:
    node = follower()
    node.passes(5.0)
    node.hears(Beat('me', 'life-1'), heartbeat_reply('name'))
    node.passes(5.0)
    number, seen = numbers(node)
    assert number > seen > 0
    request = Beat('me', 'life-1', 0, number, seen)
    node.protocol.failed(request, node.now)
    node.passes(1.0)
    node.hears(Connect(), ConnectReply(''))
    later, still = numbers(node)
    assert later > number and still == seen, 'what was not answered proves nothing'
    node.protocol.reply(request, replace(heartbeat_reply('name'), same=False), node.now)
    assert node.may_claim() == [] and node.protocol.quarantined
    node.passes(5.0)
    assert numbers(node) == (later + 2, later + 1)


@pytest.mark.parametrize('foreign', [{'same': False}, {'history': 'other'}])
def test_rows_of_another_history_than_the_last_heartbeats_do_not_count(
    foreign: dict[str, object],
) -> None:
    node = follower()
    node.passes(5.0)
    node.hears(Beat('me', 'life-1'), heartbeat_reply('name'))
    node.protocol.notified('plan 2', node.now)
    node.hears(Refresh('me', 'life-1'), replace(holdings(row(0, 9), version=2), **foreign))  # type: ignore[arg-type]  # fields by name
    assert node.protocol.owned == TokenSet([(0, 5)])
    node.hears(Beat('me', 'life-1'), heartbeat_reply('name', number=3))
    node.hears(Refresh('me', 'life-1'), replace(holdings(row(0, 9), version=2), history='name'))
    assert node.protocol.owned == TokenSet([(0, 9)])


def test_draining_gives_everything_away_and_stays() -> None:
    node = follower()
    node.protocol.drain(node.now)
    node.hears(Drain('me', 'life-1', True), True)
    node.hears(
        Refresh('me', 'life-1'),
        holdings(row(0, 5, 'second', version=2), version=2, state='draining'),
    )
    assert not node.protocol.drained
    node.hears(Give('me', 'life-1', ((0, 5),), 2, (('task-3', 3),)), GiveReply(5))
    node.hears(Refresh('me', 'life-1'), holdings(version=3, state='draining'))
    assert node.protocol.drained and node.protocol.phase is Phase.ACTIVE


@pytest.mark.parametrize('draining', [True, False])
def test_who_changes_his_mind_while_the_wish_is_on_its_way_gets_what_he_wished_last(
    draining: bool,
) -> None:
    node = follower()
    wish = {True: node.protocol.drain, False: node.protocol.undrain}
    if not draining:
        node.protocol.drain(node.now)
        node.hears(Drain('me', 'life-1', True), True)
        node.hears(Refresh('me', 'life-1'), holdings(row(0, 5), state='draining'))
    wish[draining](node.now)
    request = Drain('me', 'life-1', draining)
    assert node.asks() == request
    wish[not draining](node.now)
    node.protocol.reply(request, True, node.now)
    node.hears(Drain('me', 'life-1', not draining), True)


def test_a_node_that_drained_itself_takes_part_again_unless_somebody_holds_it() -> None:
    node = follower()
    node.protocol.drain(node.now, by_itself=True)
    node.hears(Drain('me', 'life-1', True, by_itself=True), True)
    node.protocol.undrain(node.now, by_itself=True)
    node.hears(Drain('me', 'life-1', False, by_itself=True), True)
    assert node.protocol.state == 'active'
    node.protocol.drain(node.now, by_itself=True)
    node.hears(Drain('me', 'life-1', True, by_itself=True), True)
    node.protocol.drain(node.now)  # the user holds it: the row has to know
    node.hears(Drain('me', 'life-1', True), True)
    node.protocol.undrain(node.now, by_itself=True)
    node.hears(Drain('me', 'life-1', False, by_itself=True), False)
    assert node.protocol.state == 'draining' and not isinstance(node.asks(), Drain)


def test_a_node_is_not_drained_while_a_plan_may_still_send_it_tokens() -> None:
    node = follower()
    node.protocol.drain(node.now)
    node.hears(Drain('me', 'life-1', True), True)
    node.hears(Refresh('me', 'life-1'), RefreshReply(2, 'draining', (), False, 3))
    assert not node.protocol.drained
    node.protocol.notified('plan 3', node.now)
    node.hears(Refresh('me', 'life-1'), holdings(version=3, state='draining'))
    assert node.protocol.drained


def test_what_is_in_use_holds_up_no_other_token() -> None:
    node = follower(has_release=True, release_timeout=2.0)
    node.protocol.notified('plan 2', node.now)
    node.hears(
        Refresh('me', 'life-1'), holdings(row(0, 3), row(3, 5, 'second', version=2), version=2)
    )
    (release,) = (effect for effect in node.effects() if isinstance(effect, Release))
    node.protocol.release_went_on(release.number, TokenSet([(4, 5)]), node.now)
    node.hears(Give('me', 'life-1', ((3, 4),), 2, (('task-3', 3),)), GiveReply(2))
    still = row(4, 5, 'second', version=2)
    node.hears(Refresh('me', 'life-1'), holdings(row(0, 3), still, version=2))
    assert node.asks() is None
    # Another plan moves other tokens: they do not wait either.
    node.protocol.notified('plan 3', node.now)
    rows = row(0, 2), row(2, 3, 'second', version=3), still
    node.hears(Refresh('me', 'life-1'), holdings(*rows, version=3))
    (second,) = (effect for effect in node.effects() if isinstance(effect, Release))
    assert second.tokens == {2} and node.may_claim() == [0, 1]
    node.protocol.released(second.number, node.now)
    node.hears(Give('me', 'life-1', ((2, 3),), 3, ()), GiveReply(3))
    node.hears(Refresh('me', 'life-1'), holdings(row(0, 2), still, version=3))
    assert node.asks() is None
    node.protocol.released(release.number, node.now)
    assert node.asks() == Give('me', 'life-1', ((4, 5),), 3, ())


def test_what_is_still_in_use_after_the_time_is_waited_for_no_more() -> None:
    """The database was away when the time was over, and on_release goes on for a moment."""
    node = follower(has_release=True, release_timeout=2.0)
    node.protocol.notified('plan 2', node.now)
    node.hears(
        Refresh('me', 'life-1'), holdings(row(0, 3), row(3, 5, 'second', version=2), version=2)
    )
    (release,) = (effect for effect in node.effects() if isinstance(effect, Release))
    node.protocol.release_went_on(release.number, TokenSet([(3, 5)]), node.now)
    assert node.asks() is None
    node.passes(2.0)
    give = node.asks()
    assert isinstance(give, Give) and give.ranges == ((3, 5),)
    assert [effect.level for effect in node.effects() if isinstance(effect, Note)] == ['warning']
    node.protocol.release_went_on(release.number, TokenSet([(4, 5)]), node.now)
    node.protocol.refused(give, node.now)
    node.asks()
    assert not node.effects()


def test_leaving_stops_claiming_at_once_and_deletes_the_row_after_on_release() -> None:
    node = follower(has_release=True)
    node.protocol.leave(node.now)
    assert node.may_claim() == []
    (release,) = (effect for effect in node.effects() if isinstance(effect, Release))
    assert node.asks() is None
    node.protocol.released(release.number, node.now)
    node.hears(Leave('me', 'life-1'), True)
    assert node.effects() == [Left()]


@pytest.mark.parametrize('expiry', [0.0, -5.0])
def test_an_expired_lock_does_not_make_the_successor_look_in_a_loop(expiry: float) -> None:
    node = follower()
    node.passes(5.0)
    node.beat(1, 'active', LEADER[:1])
    members = (member('leader', 'x', 1, 0.0), member('me', 'life-1', 1, 1.0))
    node.hears(Refresh('me', 'life-1'), holdings(row(0, 5)))
    node.hears(Observe(), ObserveReply(members, 1, False, expiry))
    assert node.asks() is None
    assert node.protocol.wake_at > node.now
