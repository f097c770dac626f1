"""What a node asks about tasks that others have taken: in pieces, again where it may have changed,
and never more than it must.
"""

from __future__ import annotations

from array import array

from jobsync_core.assignment.tokens import TokenSet
from jobsync_core.protocol.messages.handover import Lives, LivesReply, Take, TakeReply
from jobsync_core.protocol.ownership import Ownership
from jobsync_core.protocol.taken_tasks import TakenTasks

TOTAL = 100


class Node:
    """TakenTasks, and the ownership that they fill."""

    def __init__(self) -> None:
        self.ownership = Ownership(TOTAL)
        self.taken_tasks = TakenTasks('me', self.ownership)
        self.now = 100.0

    def gains(self, *ranges: tuple[int, int]) -> None:
        self.taken_tasks.owns(self.ownership.tokens | TokenSet(ranges))

    def hears(self, reply: TakeReply, took: float = 0.1) -> None:
        request = self.taken_tasks.next(self.now)
        assert isinstance(request, Take)
        known = self.taken_tasks.taken(request, reply, self.now, took, 1.0)
        self.ownership.replace(self.ownership.tokens | known)

    def keys(self, *tasks: tuple[int, str]) -> array[int]:
        return self.ownership.exclusions.keys_of(tasks)

    def excluded(self, token: int, text: str) -> bool:
        return self.ownership.exclusions.excludes(token, text)


def asked(node: Node) -> tuple[tuple[int, int], ...]:
    request = node.taken_tasks.next(node.now)
    assert isinstance(request, Take)
    return request.ranges


def test_each_piece_is_active_as_soon_as_it_is_known() -> None:
    node = Node()
    node.gains((0, 10), (20, 30))
    assert asked(node) == ((0, 10), (20, 30))
    node.hears(TakeReply(((0, 10), (20, 22)), node.keys((21, 'x'))))
    assert node.ownership.tokens == TokenSet([(0, 10), (20, 22)]) and node.excluded(21, 'x')
    assert asked(node) == ((22, 30),)
    node.hears(TakeReply(((22, 30),)))
    assert node.ownership.tokens == TokenSet([(0, 10), (20, 30)])
    assert node.taken_tasks.next(node.now) is None and node.taken_tasks.wake_at == float('inf')


def test_pieces_grow_while_answers_are_quick_and_shrink_when_they_are_not() -> None:
    node = Node()
    node.gains((0, 100))
    limits = []
    for took in (0.1, 0.1, 0.1, 3.0, 0.1):
        request = node.taken_tasks.next(node.now)
        assert isinstance(request, Take)
        limits.append(request.limit)
        node.hears(TakeReply((request.ranges[0],) if took > 5 else ()), took)
    assert limits == [10_000, 20_000, 40_000, 50_000, 25_000]
    request = node.taken_tasks.next(node.now)
    node.taken_tasks.interrupted(request)
    node.gains((0, 100))
    last = node.taken_tasks.next(node.now)
    assert isinstance(request, Take) and isinstance(last, Take) and last.limit == request.limit // 4


def test_a_token_in_parts_is_active_when_its_last_part_is_known() -> None:
    node = Node()
    node.gains((5, 7))
    node.hears(TakeReply((), node.keys((5, 'a')), after='a'))
    assert not node.ownership.tokens
    request = node.taken_tasks.next(node.now)
    assert isinstance(request, Take) and request.after == 'a'
    node.hears(TakeReply(((5, 6),), node.keys((5, 'b'))))
    assert node.ownership.tokens == TokenSet([(5, 6)])
    assert node.excluded(5, 'a') and node.excluded(5, 'b')
    following = node.taken_tasks.next(node.now)
    assert isinstance(following, Take) and following.after is None


def test_a_part_is_not_continued_after_the_connection_was_lost() -> None:
    node = Node()
    node.gains((5, 7))
    node.hears(TakeReply((), node.keys((5, 'a')), after='a'))
    node.taken_tasks.interrupted(None)
    node.gains((5, 7))
    request = node.taken_tasks.next(node.now)
    assert isinstance(request, Take) and request.after is None


def test_when_nodes_have_gone_their_tokens_are_asked_about_again() -> None:
    node = Node()
    node.gains((0, 10))
    node.hears(TakeReply(((0, 5),), node.keys((3, 'x')), holders=('a', 'b')))
    node.hears(TakeReply(((5, 10),), node.keys((7, 'y')), holders=('b',)))
    assert node.taken_tasks.next(node.now) is None
    node.taken_tasks.plan_changed()
    assert node.taken_tasks.next(node.now) == Lives(('a', 'b'))
    node.taken_tasks.gone(LivesReply(('a',)))
    assert asked(node) == ((0, 5),)
    assert node.excluded(3, 'x'), 'until the answer is there'
    node.hears(TakeReply(((0, 5),)))
    assert not node.excluded(3, 'x') and node.excluded(7, 'y')
    assert node.ownership.tokens == TokenSet([(0, 10)])
    node.taken_tasks.plan_changed()
    assert node.taken_tasks.next(node.now) == Lives(('b',))


def test_a_plan_costs_nothing_where_nobody_else_holds_anything_here() -> None:
    node = Node()
    node.gains((0, 10))
    node.hears(TakeReply(((0, 10),), node.keys((3, 'audited'))))
    node.taken_tasks.plan_changed()
    assert node.taken_tasks.next(node.now) is None


def test_a_promise_of_another_node_is_looked_at_until_it_is_kept_or_taken_back() -> None:
    node = Node()
    node.gains((0, 10))
    node.hears(TakeReply(((0, 10),), node.keys((3, 'x'), (4, 'y')), holders=('a',), promised=(3,)))
    assert node.taken_tasks.next(node.now) is None and node.taken_tasks.wake_at > node.now
    node.now = node.taken_tasks.wake_at
    assert asked(node) == ((3, 4),)
    node.hears(TakeReply(((3, 4),), node.keys((3, 'x')), holders=('a',), promised=(3,)))
    node.now = node.taken_tasks.wake_at
    node.hears(TakeReply(((3, 4),)))
    assert not node.excluded(3, 'x') and node.excluded(4, 'y')
    assert node.taken_tasks.wake_at == float('inf')


def test_what_was_lost_is_asked_about_no_more() -> None:
    node = Node()
    node.gains((0, 10))
    node.hears(TakeReply(((0, 10),), node.keys((3, 'x')), holders=('a',), promised=(3,)))
    node.ownership.replace(TokenSet([(5, 10)]))
    node.taken_tasks.owns(TokenSet([(5, 10)]))
    node.now += 60
    assert node.taken_tasks.next(node.now) is None
    node.taken_tasks.plan_changed()
    node.taken_tasks.gone(LivesReply(('a',)))
    assert asked(node) == ((5, 10),)
    node.taken_tasks.reset()
    assert node.taken_tasks.next(node.now) is None
