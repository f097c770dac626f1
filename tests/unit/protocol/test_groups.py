"""Queue groups in a node's life, told one request at a time."""

from __future__ import annotations

from dataclasses import replace

import pytest

from jobsync_core.assignment.groups import GROUP_SPAN
from jobsync_core.assignment.model import Segment
from jobsync_core.assignment.tokens import TokenSet
from jobsync_core.process import Process
from jobsync_core.protocol.effects import RebalanceEvent, Release
from jobsync_core.protocol.messages import Reply, Request
from jobsync_core.protocol.messages.connection import Connect, ConnectReply
from jobsync_core.protocol.messages.groups import Enroll, EnrollReply, Ids
from jobsync_core.protocol.messages.handover import (
    Give,
    GiveReply,
    Refresh,
    RefreshReply,
    Take,
    TakeReply,
)
from jobsync_core.protocol.messages.membership import (
    Activate,
    ActivateReply,
    Beat,
    HeartbeatReply,
    Join,
    JoinReply,
)
from jobsync_core.protocol.messages.signs import Sign
from jobsync_core.protocol.node import Protocol, Settings
from jobsync_core.protocol.ownership import Ownership

ME = Process('here', 'boot', 'ns', 1, 't')
LEADERS = (Sign('leader', 'x', 1), Sign('second', 'y', 1))
HEAVY: Ids = (('heavy', 3),)
FIRST = 3 * GROUP_SPAN  # the first token of the group


class Node:
    """A protocol, its clock, and the answers that a test gives it."""

    def __init__(self, *groups: str, has_release: bool = False) -> None:
        self.now = 1000.0
        self.lives = 0
        self.ownership = Ownership(10)
        self.protocol = Protocol(
            'me',
            Settings(total_tokens=10, groups=groups, has_release=has_release),
            ME,
            self.ownership,
            new_incarnation=self._life,
            is_known_dead=lambda process: False,
        )

    def _life(self) -> str:
        self.lives += 1
        return f'life-{self.lives}'

    def asks(self) -> Request | None:
        """What it sends now, without the numbers of heartbeats."""
        asked = self.protocol.next(self.now)
        if isinstance(asked, Beat):
            return replace(asked, number=0, seen=0, since=0)
        return replace(asked, seen=0) if isinstance(asked, Refresh) else asked

    def hears(self, request: Request, reply: Reply) -> None:
        """It asks exactly this, and gets that answer."""
        assert self.asks() == request
        self.now += 0.01
        self.protocol.reply(request, reply, self.now)

    def beats(self, version: int = 1, life: str = 'life-1') -> None:
        self.hears(Beat('me', life, 0, 0), HeartbeatReply(version, 'active', LEADERS))

    def may_claim(self, first: int = 0) -> list[int]:
        return [
            token - first
            for token in range(first, first + 10)
            if self.ownership.may_claim(token, self.now)
        ]


def row(lo: int, hi: int, moving_to: str | None = None, *, blocked: bool = False) -> Segment:
    moving = moving_to is not None or blocked
    return Segment(lo, hi, 'me', moving, moving_to, blocked, 1)


def rows(*segments: Segment, groups: tuple[str, ...] = (), ids: Ids = ()) -> RefreshReply:
    return RefreshReply(1, 'active', segments, True, 0, groups=groups, ids=ids)


def member(*, has_release: bool = False) -> Node:
    """A node of a group that owns the tokens 0 to 4 of the plain Job, and 5 to 9 of the group."""
    node = Node('heavy', has_release=has_release)
    node.hears(Connect(), ConnectReply('server'))
    node.hears(Join('me', 'life-1', ME, 1.0, False, None, (), ('heavy',)), JoinReply(0, HEAVY))
    node.beats(0)
    node.hears(Activate('me', 'life-1', 1), ActivateReply(True, 3))
    reply = rows(row(0, 5), row(FIRST + 5, FIRST + 10), groups=('heavy',), ids=HEAVY)
    node.hears(Refresh('me', 'life-1'), reply)
    node.hears(Take('me', ((0, 5),)), TakeReply(((0, 5),)))
    node.hears(Refresh('me', 'life-1'), reply)
    assert node.asks() is None
    return node


def test_tokens_of_a_group_are_claimed_without_asking_who_has_taken_tasks() -> None:
    node = Node('heavy')
    node.hears(Connect(), ConnectReply('server'))
    node.hears(Join('me', 'life-1', ME, 1.0, False, None, (), ('heavy',)), JoinReply(0, HEAVY))
    node.beats(0)
    node.hears(Activate('me', 'life-1', 1), ActivateReply(True, 3))
    both = rows(row(0, 5), row(FIRST + 5, FIRST + 10), groups=('heavy',), ids=HEAVY)
    node.hears(Refresh('me', 'life-1'), both)
    assert node.may_claim() == [] and node.may_claim(FIRST) == [5, 6, 7, 8, 9]
    node.hears(Take('me', ((0, 5),)), TakeReply(((0, 5),)))
    assert node.may_claim() == [0, 1, 2, 3, 4]


def test_a_member_tells_where_the_tokens_of_its_groups_are() -> None:
    node = member()
    assert node.protocol.groups == {'': 0, 'heavy': 3} and node.protocol.holds('heavy')
    assert [
        effect.tokens_added
        for effect in node.protocol.take_effects()
        if isinstance(effect, RebalanceEvent)
    ] == [10]


def test_a_lease_that_runs_out_ends_the_claims_in_all_groups() -> None:
    node = member()
    node.now += 13.5
    assert node.may_claim() == node.may_claim(FIRST) == []


def test_a_group_is_left_in_two_steps() -> None:
    node = member(has_release=True)
    node.protocol.take_effects()
    node.protocol.enroll([], node.now)
    node.hears(Enroll('me', 'life-1', ()), EnrollReply(()))
    assert node.may_claim(FIRST) == [5, 6, 7, 8, 9], 'until the plan asks for it'
    moving = row(FIRST + 5, FIRST + 10, 'other')
    node.hears(Refresh('me', 'life-1'), rows(row(0, 5), moving, ids=HEAVY))
    assert node.may_claim(FIRST) == [] and node.may_claim() == [0, 1, 2, 3, 4]
    (release,) = (effect for effect in node.protocol.take_effects() if isinstance(effect, Release))
    assert release.tokens == TokenSet([(FIRST + 5, FIRST + 10)])
    assert node.asks() is None and node.protocol.holds('heavy')
    node.protocol.released(release.number, node.now)
    node.hears(Give('me', 'life-1', ((FIRST + 5, FIRST + 10),), 1), GiveReply(5))
    assert node.protocol.holds('heavy'), 'until the rows say so'
    node.hears(Refresh('me', 'life-1'), rows(row(0, 5)))
    assert not node.protocol.holds('heavy') and node.protocol.groups == {'': 0}
    assert node.asks() is None


def test_a_group_that_was_wanted_for_a_moment_is_not_held_for_ever() -> None:
    """The row never named it, so that nothing in the cluster changes."""
    node = member()
    node.protocol.enroll(['heavy', 'light'], node.now)
    node.protocol.enroll(['heavy'], node.now)
    assert node.protocol.holds('light'), 'a request may be on its way'
    own = row(0, 5), row(FIRST + 5, FIRST + 10)
    node.hears(Refresh('me', 'life-1'), rows(*own, groups=('heavy',), ids=HEAVY))
    assert node.protocol.holds('heavy') and not node.protocol.holds('light')
    assert node.asks() is None


def test_the_last_member_gives_its_tokens_to_nobody() -> None:
    node = member()
    node.protocol.enroll([], node.now)
    node.hears(Enroll('me', 'life-1', ()), EnrollReply(()))
    blocked = row(FIRST + 5, FIRST + 10, blocked=True)
    node.hears(Refresh('me', 'life-1'), rows(row(0, 5), blocked, ids=HEAVY))
    node.hears(Give('me', 'life-1', ((FIRST + 5, FIRST + 10),), 1), GiveReply(5))
    node.hears(Refresh('me', 'life-1'), rows(row(0, 5)))
    assert not node.protocol.holds('heavy')


def test_who_was_evicted_comes_back_with_the_groups_that_its_user_wants() -> None:
    node = member()
    node.protocol.enroll(['heavy', 'light'], node.now)
    request = node.asks()
    assert request == Enroll('me', 'life-1', ('heavy', 'light'))
    node.protocol.reply(request, None, node.now)
    assert node.may_claim(FIRST) == []
    node.hears(
        Join('me', 'life-2', ME, 1.0, True, None, (), ('heavy', 'light')),
        JoinReply(2, (('heavy', 3), ('light', 4))),
    )
    node.beats(2, 'life-2')
    assert node.protocol.groups == {'': 0, 'heavy': 3, 'light': 4}


def test_after_a_lost_connection_the_rows_say_which_groups_the_database_knows() -> None:
    node = member()
    node.protocol.disconnected(node.now)
    node.now += 1.0
    node.hears(Connect(), ConnectReply('server'))
    node.beats()
    node.hears(Refresh('me', 'life-1'), rows(row(0, 5)))
    assert node.may_claim(FIRST) == []
    node.hears(Enroll('me', 'life-1', ('heavy',)), EnrollReply((('heavy', 7),)))
    assert node.protocol.groups['heavy'] == 7


def test_a_server_that_refuses_a_group_costs_neither_heartbeats_nor_claims() -> None:
    node = member()
    node.protocol.enroll(['heavy', 'light'], node.now)
    request = node.asks()
    assert isinstance(request, Enroll)
    node.protocol.refused(request, node.now)
    assert node.asks() is None and node.may_claim(FIRST) == [5, 6, 7, 8, 9]
    assert node.protocol.wake_at == pytest.approx(node.now + 0.25)
    node.now += 0.25
    assert node.asks() == Enroll('me', 'life-1', ('heavy', 'light'))
