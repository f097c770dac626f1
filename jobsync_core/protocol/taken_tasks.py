"""What a node has to learn of the tasks that others have taken, before it may claim tokens and
while it has them.
"""

from __future__ import annotations

from ..assignment.tokens import TokenSet
from .messages.handover import Lives, LivesReply, Take, TakeReply
from .ownership import Ownership

__all__ = ['TakenTasks']

#: Rows that one answer is made of: the first time, at least, at most.
_ROWS_FIRST, _ROWS_LEAST, _ROWS_MOST = 10_000, 200, 50_000
#: Seconds until a promise of another node is looked at again.
_PROMISE_SEC = 0.5


class TakenTasks:
    """Decides what to ask, and puts what is heard into the ownership. No I/O and no clock.

    Gained tokens are asked about piece by piece, so that no answer is large and heartbeats go in
    between; each piece may be claimed as soon as it is known. What others have *claimed* becomes
    free when they go without having audited it, and what they were *promised* when they do not take
    it: such tokens are asked about again.

    Args:
        name: The node's name.
        ownership: Where the tasks are excluded.
    """

    def __init__(self, name: str, ownership: Ownership) -> None:
        self.gain = TokenSet()
        self._name = name
        self._ownership = ownership
        self._again = TokenSet()
        self._promised = TokenSet()
        self._promised_at = 0.0
        self._holders: dict[str, TokenSet] = {}
        self._must_check = False
        self._limit = _ROWS_FIRST
        self._part: tuple[int, str] | None = None

    @property
    def wake_at(self) -> float:
        """When `next` has something to ask."""
        if self.gain or self._again or self._must_check:
            return 0.0
        return self._promised_at if self._promised else float('inf')

    def owns(self, kept: TokenSet) -> None:
        """These tokens are the node's; those of them that it cannot claim yet are asked about, and
        what it lost is forgotten.
        """
        self.gain = kept - self._ownership.tokens
        self._again &= kept
        self._promised &= kept
        if self._part is not None and self._part[0] not in kept:
            self._part = None

    def plan_changed(self) -> None:
        """There is a new plan: nodes may have gone."""
        self._must_check = bool(self._holders)

    def interrupted(self, request: object) -> None:
        """The connection was lost, perhaps because the request took too long."""
        self.gain = TokenSet()
        self._part = None
        if isinstance(request, Take):
            self._limit = max(self._limit // 4, _ROWS_LEAST)

    def reset(self) -> None:
        """The node has lost all of its tokens."""
        self.gain = self._again = self._promised = TokenSet()
        self._holders = {}
        self._must_check = False
        self._part = None

    def next(self, now: float) -> Take | Lives | None:
        """What to ask now."""
        if not self.gain:
            if self._must_check:
                return Lives(tuple(sorted(self._holders)))
            if self._promised and now >= self._promised_at:
                self._again, self._promised = self._again | self._promised, TokenSet()
        tokens = self.gain or self._again
        if not tokens:
            return None
        after = (
            self._part[1]
            if self._part is not None and self._part[0] == tokens.ranges[0][0]
            else None
        )
        return Take(self._name, tokens.ranges, self._limit, after)

    def taken(
        self, request: Take, reply: TakeReply, now: float, took: float, patience: float
    ) -> TokenSet:
        """What to activate after an answer.

        Args:
            request: The question.
            reply: The answer.
            now: The time.
            took: Seconds that it took.
            patience: Seconds that an answer should take at most.
        """
        slow = took > patience
        self._limit = (
            max(self._limit // 2, _ROWS_LEAST) if slow else min(self._limit * 2, _ROWS_MOST)
        )
        first = request.ranges[0][0]
        self._part = (first, reply.after) if reply.after is not None else None
        about = TokenSet(reply.ranges if reply.after is None else [(first, first + 1)])
        if request.after is not None or (
            reply.after is not None and first in self._ownership.tokens
        ):
            self._ownership.exclude_more(
                reply.keys
            )  # a part of a token: the rest of what is known of it stays
        else:
            self._ownership.exclude(about.ranges, reply.keys)
        for life in reply.holders:
            self._holders[life] = self._holders.get(life, TokenSet()) | about
        if reply.promised:
            self._promised |= TokenSet.of(reply.promised)
            self._promised_at = now + _PROMISE_SEC
        known = TokenSet(reply.ranges)
        active = self.gain & known
        self.gain -= known
        self._again -= known
        return active

    def gone(self, reply: LivesReply) -> None:
        """Nodes are gone: what they had claimed and not audited is free."""
        self._must_check = False
        for life in reply.incarnations:
            self._again |= self._holders.pop(life, TokenSet()) & self._ownership.tokens
