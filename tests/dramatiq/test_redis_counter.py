"""Counting at Redis, while others send."""

from __future__ import annotations

from typing import Any

from jobsync_dramatiq.broker.redis_counter import RedisCounter


class _Pipe:
    def __init__(self) -> None:
        self.answers: list[Any] = []

    def llen(self, key: str) -> None:
        self.answers.append(0)

    def scard(self, key: str) -> None:
        self.answers.append(0)

    def lindex(self, key: str, at: int) -> None:
        self.answers.append(b'sent right after the queue was counted')

    def hget(self, key: str, field: str) -> None:
        self.answers.append(b'{"message_timestamp": 0}')

    def execute(self) -> list[Any]:
        return self.answers


class _Redis:
    def register_script(self, text: str) -> None: ...

    def zrange(self, key: str, first: int, last: int) -> list[bytes]:
        return []

    def pipeline(self, transaction: bool) -> _Pipe:
        return _Pipe()


class _Native:
    namespace, client = 'd', _Redis()


def test_a_message_that_comes_between_two_questions_is_no_error() -> None:
    assert RedisCounter(_Native(), 'sync_').count(['reports'], {}) == {}
