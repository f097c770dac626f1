"""The queue groups that a node belongs to: those that the user wants, those that its row names, and
those that it is leaving.

To leave a group takes two steps. The row names it no longer; the next plan asks for what the node
has there, and the node gives it away as always. Until nothing is left, and nothing on its way here,
the node goes on with what it has, and its queue has to be consumed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ..assignment.groups import PLAIN, group_of, window
from ..assignment.tokens import TokenSet
from .agenda import NEVER, Due
from .messages.groups import Enroll, EnrollReply, Ids
from .messages.handover import RefreshReply
from .messages.membership import HeartbeatReply, JoinReply
from .messages.signs import Life
from .rhythm import Backoff

__all__ = ['Enrollment']

#: Seconds until the server is asked again after it has refused, the first time.
_AGAIN = 0.25


class Enrollment:
    """One node's queue groups. That of the plain Job, named '', is always one of them.

    Args:
        groups: Names of those that it belongs to at first.
        total_tokens: Tokens of each group.
        longest: Seconds at most until the server is asked again after it has refused.

    Attributes:
        wanted: Names of the groups that the user wants, in order.
        ids: Of the groups that the node's row, or rows of its tokens, name.
    """

    def __init__(self, groups: Iterable[str], total_tokens: int, longest: float) -> None:
        self.wanted = _ordered(groups)
        self.ids: Mapping[str, int] = {'': PLAIN}
        self._total_tokens = total_tokens
        self._told = self.wanted
        self._leaving: frozenset[str] = frozenset()
        self._retry = Backoff(_AGAIN, longest)

    def enroll(self, life: Life) -> Due:
        """The row names what the user wants."""
        if self.is_told:
            return NEVER, lambda: None
        return self._retry.not_before, lambda: Enroll(*life, self.wanted)

    @property
    def is_told(self) -> bool:
        """Whether the row names what the user wants, as far as is known."""
        return self._told == self.wanted

    def want(self, groups: Iterable[str]) -> None:
        """Belong to these groups, and no others."""
        wanted = _ordered(groups)
        self._leaving = (self._leaving | {*self.wanted}) - {*wanted}
        self.wanted = wanted

    def holds(self, group: str) -> bool:
        """Whether this node has tokens of the group, or may get some."""
        return not group or group in self.wanted or group in self._leaving

    @property
    def tokens(self) -> TokenSet:
        """The tokens of all groups that this node holds: a row elsewhere names it because a
        statement came late, or because the database has forgotten that it has left.
        """
        ids = (number for name, number in self.ids.items() if self.holds(name))
        return TokenSet(window(number, self._total_tokens) for number in ids)

    def joined(self, reply: JoinReply) -> None:
        """The row is there; it may be that of an earlier request."""
        self._is_told(tuple(name for name, _ in reply.ids))
        self._learn(reply.ids)

    def enrolled(self, request: Enroll, reply: EnrollReply) -> None:
        """The row names the groups that were asked for."""
        self._is_told(request.groups)
        self._learn((*self.ids.items(), *reply.ids))  # of groups that it is leaving as well

    def heard(self, reply: HeartbeatReply) -> None:
        """What the row names. An Enroll of before may have been carried out late, after a newer
        one, and nothing else would tell of it.
        """
        if reply.groups is not None:
            self._is_told(_ordered(reply.groups))

    def refused(self, now: float) -> None:
        """The server has refused."""
        self._retry.failed(now)

    def refreshed(self, reply: RefreshReply) -> None:
        """What the rows say."""
        self._is_told(_ordered(reply.groups))
        self._learn(reply.ids)
        if not reply.incoming:
            left = {group_of(row.lo) for row in reply.segments}
            self._leaving = frozenset(
                name for name in self._leaving if name in reply.groups or self.ids.get(name) in left
            )

    def evicted(self) -> None:
        """The row is gone, and all tokens with it."""
        self._leaving = frozenset()

    def _is_told(self, groups: tuple[str, ...]) -> None:
        self._told = groups
        if groups == self.wanted:
            self._retry.reset()

    def _learn(self, ids: Ids) -> None:
        self.ids = {'': PLAIN, **dict(ids)}


def _ordered(groups: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted({*groups} - {''}))
