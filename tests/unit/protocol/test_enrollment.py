"""A node's queue groups: what the user wants, what the row says, and what is still to be given."""

from __future__ import annotations

import pytest

from jobsync_core.assignment.groups import GROUP_SPAN
from jobsync_core.assignment.model import Segment
from jobsync_core.assignment.tokens import TokenSet
from jobsync_core.protocol.agenda import NEVER
from jobsync_core.protocol.enrollment import Enrollment
from jobsync_core.protocol.messages.groups import Enroll, EnrollReply, Ids
from jobsync_core.protocol.messages.handover import RefreshReply
from jobsync_core.protocol.messages.membership import HeartbeatReply, JoinReply
from jobsync_core.protocol.messages.signs import Life

LIFE = Life('me', 'life')


def enrollment(*groups: str) -> Enrollment:
    return Enrollment(groups, 10, longest=1.0)


def enrolled(*ids: tuple[str, int]) -> Enrollment:
    """A node whose row names these groups, as it wants them."""
    node = enrollment(*dict(ids))
    node.joined(JoinReply(1, ids))
    return node


def rows(
    *groups: int, names: tuple[str, ...] = (), ids: Ids = (), incoming: int = 0
) -> RefreshReply:
    """A row of the node in each of these groups."""
    segments = tuple(Segment(group * GROUP_SPAN, group * GROUP_SPAN + 5, 'me') for group in groups)
    return RefreshReply(1, 'active', segments, True, incoming, groups=names, ids=ids)


def asks(node: Enrollment, now: float = 0.0) -> object:
    at, request = node.enroll(LIFE)
    return request() if now >= at else None


def test_a_node_that_wants_no_groups_belongs_to_that_of_the_plain_job() -> None:
    node = enrolled()
    assert asks(node) is None and node.enroll(LIFE)[0] == NEVER
    assert node.holds('') and not node.holds('heavy')
    assert node.tokens == TokenSet([(0, 10)]) and node.ids == {'': 0}


def test_the_groups_that_it_joined_with_are_not_asked_for_again() -> None:
    node = enrolled(('heavy', 3), ('light', 1))
    assert asks(node) is None and node.wanted == ('heavy', 'light')
    assert node.tokens == TokenSet(
        [(0, 10), (GROUP_SPAN, GROUP_SPAN + 10), (3 * GROUP_SPAN, 3 * GROUP_SPAN + 10)]
    )


@pytest.mark.parametrize('groups', [('b', 'a', 'b'), ('a', '', 'b'), ['b', 'a']])
def test_groups_are_told_once_and_in_order(groups: tuple[str, ...]) -> None:
    node = enrolled()
    node.want(groups)
    assert asks(node) == Enroll('me', 'life', ('a', 'b'))
    node.enrolled(Enroll('me', 'life', ('a', 'b')), EnrollReply((('a', 1), ('b', 2))))
    assert asks(node) is None and node.ids == {'': 0, 'a': 1, 'b': 2}


def test_a_wish_that_changes_while_one_is_on_its_way_is_told_as_well() -> None:
    node = enrolled()
    node.want(['a'])
    request = Enroll('me', 'life', ('a',))
    assert asks(node) == request
    node.want(['b'])
    node.enrolled(request, EnrollReply((('a', 1),)))
    assert asks(node) == Enroll('me', 'life', ('b',))


def test_a_row_of_an_earlier_request_is_put_right() -> None:
    node = enrollment('a')
    node.want(['b'])
    node.joined(JoinReply(1, (('a', 1),)))
    assert asks(node) == Enroll('me', 'life', ('b',))


def test_what_the_database_has_forgotten_is_asked_for_again() -> None:
    node = enrolled(('a', 1))
    node.refreshed(rows(0))
    assert asks(node) == Enroll('me', 'life', ('a',))
    assert node.ids == {'': 0}, 'the id of before may be that of another group by now'


def test_a_group_that_it_leaves_is_held_until_nothing_is_left_of_it() -> None:
    node = enrolled(('a', 1))
    node.want([])
    node.enrolled(Enroll('me', 'life', ()), EnrollReply(()))
    assert node.holds('a') and GROUP_SPAN in node.tokens, 'it goes on with what it has'
    node.refreshed(rows(0, 1, ids=(('a', 1),)))
    assert node.holds('a') and GROUP_SPAN in node.tokens
    node.refreshed(rows(0))
    assert not node.holds('a') and node.tokens == TokenSet([(0, 10)])


@pytest.mark.parametrize(
    'reply',
    [rows(0, names=('a',), ids=(('a', 1),)), rows(0, incoming=2)],
    ids=['the row names it still', 'tokens are on their way'],
)
def test_it_is_held_while_some_of_it_may_come(reply: RefreshReply) -> None:
    node = enrolled(('a', 1))
    node.want([])
    node.refreshed(reply)
    assert node.holds('a')
    node.refreshed(rows(0))
    assert not node.holds('a')


def test_who_comes_back_to_a_group_before_it_has_left_goes_on() -> None:
    node = enrolled(('a', 1))
    node.want([])
    node.want(['a'])
    assert asks(node) is None
    node.refreshed(rows(0, names=('a',), ids=(('a', 1),)))
    assert node.holds('a') and GROUP_SPAN in node.tokens


def test_tokens_of_a_group_that_it_has_left_are_not_claimed_whatever_the_row_says() -> None:
    node = enrolled(('a', 1))
    node.want([])
    node.refreshed(rows(0))
    late = rows(0, 1, names=('a',), ids=(('a', 1),))  # an Enroll of before came late
    node.refreshed(late)
    assert not node.holds('a') and node.tokens == TokenSet([(0, 10)])
    assert asks(node) == Enroll('me', 'life', ())


def test_an_eviction_ends_what_it_was_leaving_and_keeps_what_it_wants() -> None:
    node = enrolled(('a', 1), ('b', 2))
    node.want(['b'])
    node.evicted()
    assert not node.holds('a') and node.holds('b') and node.wanted == ('b',)


def test_a_refusal_is_tried_again_later_and_later_until_it_works() -> None:
    node = enrolled()
    node.want(['a'])
    waits = []
    for _ in range(4):
        node.refused(0.0)
        waits.append(node.enroll(LIFE)[0])
    assert waits == [0.25, 0.5, 1.0, 1.0]
    node.enrolled(Enroll('me', 'life', ('a',)), EnrollReply((('a', 1),)))
    node.want(['b'])
    assert asks(node) == Enroll('me', 'life', ('b',))


def test_a_heartbeat_tells_that_an_enroll_of_before_was_carried_out_after_a_newer_one() -> None:
    node = enrolled(('a', 1))
    node.want(['a', 'b'])
    node.enrolled(Enroll('me', 'life', ('a', 'b')), EnrollReply((('a', 1), ('b', 2))))
    node.heard(HeartbeatReply(1, 'active', (), groups=('b', 'a')))
    assert asks(node) is None
    node.heard(HeartbeatReply(1, 'active', (), groups=('a',)))
    assert asks(node) == Enroll('me', 'life', ('a', 'b'))
    node.heard(HeartbeatReply(1, 'active', (), groups=('a', 'b')))
    assert asks(node) is None
