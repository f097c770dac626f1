"""Whatever goes wrong in a node's own thread, it comes back by itself; and where it cannot, it says
so.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from http.client import HTTPConnection
from typing import Any

import pytest

from jobsync_core import CoordinationConfig, Job
from jobsync_core.agent.agent import Agent
from jobsync_core.errors import LockNotAvailable, StatementRefused
from jobsync_core.protocol.messages import Request
from jobsync_core.protocol.messages.connection import Connect
from jobsync_core.protocol.messages.handover import Refresh
from jobsync_core.protocol.messages.membership import Beat
from jobsync_core.web.health import HealthServer
from tests.support.cluster import node_of, query
from tests.support.waiting import eventually

UNFORESEEN = [
    RuntimeError("can't start new thread"),
    MemoryError(),
    RecursionError('too deep'),
    KeyError('a bug'),
]


def sabotage(
    job: Job, error: BaseException, broken: Callable[[Request], bool] = lambda request: True
) -> threading.Event:
    """Have the agent's requests raise until the event is set; the event."""
    perform, mended = node_of(job).agent._perform, threading.Event()

    def fails(request: Request) -> Any:
        if not mended.is_set() and broken(request):
            raise error
        return perform(request)

    node_of(job).agent._perform = fails  # type: ignore[method-assign]
    return mended


@pytest.mark.parametrize('error', UNFORESEEN, ids=lambda error: type(error).__name__)
def test_an_unforeseen_error_suspends_claims_until_all_has_been_read_anew_and_is_said_once(
    config: CoordinationConfig, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    with Job('n1', config, wait_on_enter=0) as job:
        eventually(lambda: job.can_claim_task(1))
        with caplog.at_level(logging.ERROR, logger='jobsync_core.agent.agent'):
            mended = sabotage(job, error)
            eventually(lambda: not job.am_i_healthy() and not job.can_claim_task(1))
            eventually(
                lambda: any(count for _, count in node_of(job).agent._said.values()), timeout=20
            )
            assert job.alive
            mended.set()
            eventually(lambda: job.am_i_healthy() and job.can_claim_task(1), timeout=20)
        said = [
            record.getMessage() for record in caplog.records if 'unforeseen' in record.getMessage()
        ]
        assert len([text for text in said if 'claiming stops' in text]) == 1
        assert len(said) == len(set(said)), (
            'a request beside the heartbeats may have failed first, which is another line'
        )


def test_a_connection_that_somebody_ends_again_and_again_is_said_once(
    config: CoordinationConfig, caplog: pytest.LogCaptureFixture
) -> None:
    def sessions() -> list[int]:
        rows = query(
            config, "SELECT pid FROM pg_stat_activity WHERE application_name = 'jobsync n1'"
        )
        return [pid for (pid,) in rows]

    with Job('n1', config, wait_on_enter=0) as job:
        eventually(lambda: job.can_claim_task(1))
        with caplog.at_level(logging.WARNING, logger='jobsync_core.agent.agent'):
            for _ in range(8):  # now and then a heartbeat finds it first
                before = eventually(sessions)
                query(config, 'SELECT pg_terminate_backend(pid) FROM unnest(%s) AS pid', (before,))
                eventually(lambda before=before: set(sessions()) - set(before))  # type: ignore[misc]
                eventually(job.am_i_healthy)
        said = [line for line in caplog.messages if 'lost its connection' in line]
    assert len(said) <= 1


def test_no_thread_to_be_had_while_connecting_anew_ends_nothing(config: CoordinationConfig) -> None:
    with Job('n1', config, wait_on_enter=0) as job:
        eventually(lambda: job.can_claim_task(1))
        mended = sabotage(job, UNFORESEEN[0], lambda request: isinstance(request, Connect))
        node_of(job).agent.post(lambda: node_of(job).agent._connection.close())  # type: ignore[union-attr]
        eventually(lambda: not job.can_claim_task(1))
        mended.set()
        eventually(lambda: job.can_claim_task(1), timeout=20)


def test_an_error_in_what_is_told_to_the_user_is_survived(
    config: CoordinationConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Job('n1', config, wait_on_enter=0) as job:
        eventually(lambda: job.can_claim_task(1))
        run_effects, failures = Agent._run_effects, [ValueError('a bug in a callback path')]

        def fails(agent: Agent) -> None:
            if failures:
                raise failures.pop()
            run_effects(agent)

        monkeypatch.setattr(Agent, '_run_effects', fails)
        eventually(lambda: not failures)
        eventually(lambda: job.can_claim_task(1), timeout=20)


def test_a_node_that_cannot_enter_tells_whoever_waits(
    config: CoordinationConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(agent: Agent, request: Request) -> Any:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(Agent, '_perform', fails)
    with pytest.raises(RuntimeError, match='new thread'), Job('n1', config, wait_on_enter=0):
        pass


def live(server: HealthServer) -> int:
    connection = HTTPConnection('127.0.0.1', server.port, timeout=10)
    try:
        connection.request('GET', '/health/live')
        return connection.getresponse().status
    finally:
        connection.close()


@pytest.mark.filterwarnings('ignore::pytest.PytestUnhandledThreadExceptionWarning')
def test_where_the_agent_has_truly_ended_probes_say_so(config: CoordinationConfig) -> None:
    with Job('n1', config, wait_on_enter=0) as job:
        server = HealthServer('127.0.0.1:0', ready=dict, metrics=None, live=lambda: job.alive)
        try:
            eventually(lambda: job.can_claim_task(1))
            assert job.alive and live(server) == 200
            sabotage(job, SystemExit(), lambda request: isinstance(request, Beat))
            eventually(lambda: not job.alive)
            assert live(server) == 503
            assert not job.am_i_healthy() and not job.can_claim_task(1)
        finally:
            server.close()


def test_a_callback_thread_that_could_not_be_started_is_started_later(
    config: CoordinationConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    start = threading.Thread.start
    refused: list[threading.Thread] = []

    def start_or_not(thread: threading.Thread) -> None:
        if thread.name == 'jobsync-callbacks' and len(refused) < 3:
            refused.append(thread)
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, 'start', start_or_not)
    with Job(
        'n1', config, wait_on_enter=0, on_rebalance=lambda event: calls.append(event.tokens_added)
    ) as job:
        eventually(lambda: calls == [config.total_tokens])
        assert job.can_claim_task(1) and len(refused) == 3


def test_a_round_that_the_server_refuses_costs_no_connection(config: CoordinationConfig) -> None:
    with Job('n1', config, wait_on_enter=0) as job:
        eventually(lambda: job.can_claim_task(1))
        connection = node_of(job).agent._connection
        refusals: list[Request] = []
        handle = node_of(job).agent._control.leader.lead

        def refuse(*args: Any) -> Any:
            refusals.append(args[1])
            raise LockNotAvailable('canceling statement due to lock timeout')

        node_of(job).agent._control.leader.lead = refuse  # type: ignore[method-assign,assignment]
        with Job('n2', config, wait_on_enter=0):
            eventually(lambda: len(refusals) >= 2)
            assert node_of(job).agent._connection is connection and job.am_i_healthy()
            node_of(job).agent._control.leader.lead = handle  # type: ignore[method-assign]
            eventually(lambda: len(job.my_tokens) == config.total_tokens // 2, timeout=20)


@pytest.mark.parametrize('request_type', [Beat, Refresh])
def test_a_server_that_goes_on_refusing_is_asked_less_and_less_often_and_said_once(
    config: CoordinationConfig, caplog: pytest.LogCaptureFixture, request_type: type[Request]
) -> None:
    tries = list[float]()

    def broken(request: Request) -> bool:
        if isinstance(request, request_type):
            tries.append(time.monotonic())
            return True
        return False

    with Job('n1', config, wait_on_enter=0) as job:
        eventually(lambda: job.can_claim_task(1))
        for _ in range(2):
            tries.clear()
            caplog.clear()
            with caplog.at_level(logging.WARNING, logger='jobsync_core.agent.agent'):
                mended = sabotage(
                    job,
                    StatementRefused(
                        'could not extend file: No space left on device', '53100', True
                    ),
                    broken,
                )
                node_of(job).agent.post(lambda: node_of(job).agent._connection.close())  # type: ignore[union-attr]
                eventually(lambda: len(tries) >= 7, timeout=30)
                mended.set()
            eventually(lambda: job.am_i_healthy() and job.can_claim_task(1), timeout=20)
            assert (
                len([record for record in caplog.records if 'No space left' in record.getMessage()])
                == 1
            )  # also the second time
            assert tries[6] - tries[5] > 0.9
            time.sleep(0.2)
