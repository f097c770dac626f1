"""What a worker tells of tokens that leave while work on them is running."""

from __future__ import annotations

from jobsync_core.assignment.tokens import TokenSet
from jobsync_core.worker.entering import in_use, still_in_use

TOKENS = TokenSet([(0, 64)])


class Work:
    """Which tokens are busy, and a clock that goes on with each look."""

    def __init__(self, *busy: int) -> None:
        self.busy_tokens = set(busy)
        self.time = 0.0

    def busy(self, tokens: TokenSet) -> bool:
        return any(token in tokens for token in self.busy_tokens)

    def now(self) -> float:
        self.time += 0.1
        return self.time


def test_what_is_in_use_is_told_at_once_even_where_it_is_all() -> None:
    """What leaves later waits until this is told."""
    work = Work(*range(64))
    looks = still_in_use(TOKENS, work.busy, 60.0, work.now)
    assert next(looks) == TOKENS
    assert next(looks) is None
    work.busy_tokens = {5, 9}
    assert next(looks) == TokenSet([(5, 6), (9, 10)])
    assert next(looks) is None
    work.busy_tokens = set()
    assert list(looks) == []


def test_nobody_waits_for_what_is_not_in_use_nor_longer_than_the_limit() -> None:
    idle, stuck = Work(), Work(3)
    assert list(still_in_use(TOKENS, idle.busy, 60.0, idle.now)) == []
    looks = list(still_in_use(TOKENS, stuck.busy, 1.0, stuck.now))
    assert looks[0] == TokenSet([(3, 4)]) and set(looks[1:]) == {None} and len(looks) < 12


def test_tokens_in_use_are_found_by_halves() -> None:
    work = Work(1, 40, 63)
    scattered = TokenSet([(0, 2), (40, 41), (60, 64)])
    assert in_use(scattered, work.busy) == TokenSet([(1, 2), (40, 41), (63, 64)])
