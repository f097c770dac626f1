"""Scripts at Redis, over a connection that is kept, with what may go wrong."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from redis.exceptions import NoScriptError, ResponseError

from jobsync_dramatiq.broker.redis_scripts import ScriptConnection


class _Connection:
    """One of redis-py, by Sentinel: answers come in the order of the commands, for as long as it is
    open, and it stays open whatever goes wrong while one is read.

    Args:
        log: What was done.
        trouble: What is raised next, after a command was sent and before its answer is read.
    """

    def __init__(self, log: list[str], trouble: list[BaseException], **options: Any) -> None:
        self._log, self._trouble = log, trouble
        self._answers: list[Any] | None = None

    def connect(self) -> None:
        if self._answers is None:
            self._log.append('connect')
            self._answers = []

    def disconnect(self) -> None:
        self._answers = None

    def send_command(self, command: str, *args: Any) -> None:
        assert self._answers is not None
        self._log.append(command)
        self._answers.append(args[-1])

    def read_response(self) -> Any:
        if self._trouble:
            error = self._trouble.pop()
            if isinstance(error, ResponseError):
                self._answers.pop(0)  # type: ignore[union-attr]
            raise error
        return self._answers.pop(0)  # type: ignore[union-attr]


@pytest.fixture
def log() -> list[str]:
    return []


@pytest.fixture
def trouble() -> list[BaseException]:
    return []


@pytest.fixture
def run(log: list[str], trouble: list[BaseException]) -> Any:
    pool = SimpleNamespace(
        connection_class=_Connection, connection_kwargs={'log': log, 'trouble': trouble}
    )
    connection = ScriptConnection(SimpleNamespace(connection_pool=pool))
    script = SimpleNamespace(sha='sha', script='text')
    return lambda answer: connection.run(script, ['key'], [answer])


def test_a_connection_is_kept(run: Any, log: list[str]) -> None:
    assert [run(1), run(2)] == [1, 2]
    assert log == ['connect', 'EVALSHA', 'EVALSHA']


def test_a_script_that_redis_does_not_know_is_sent(
    run: Any, log: list[str], trouble: list[BaseException]
) -> None:
    trouble.append(NoScriptError())
    assert [run(1), run(2)] == [1, 2]
    assert log == ['connect', 'EVALSHA', 'EVAL', 'EVALSHA']


@pytest.mark.parametrize('error', [ResponseError('OOM'), TimeoutError(), KeyboardInterrupt()])
def test_no_answer_is_taken_for_that_of_another_command(
    run: Any, trouble: list[BaseException], error: BaseException
) -> None:
    assert run(1) == 1
    trouble.append(error)
    with pytest.raises(type(error)):
        run(2)
    assert [run(3), run(4)] == [3, 4]
