"""Another history of the database, as after the promotion of a standby: noticed wherever a claim depends on it, and waited out."""
from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from jobsync_core import CoordinationConfig, Job
from jobsync_core.embedded import EmbeddedPostgres
from jobsync_core.messages import Beat, Beaten, Holdings, Join, Joined, Process, RecordHistory, Refresh
from jobsync_core.store.connection import Connection
from jobsync_core.store.control import Control
from jobsync_core.store.schema import Tables, create_schema
from tests.pgbouncer import PgBouncer

from ..waiting import eventually
from .cluster import query
from .history import moment

TIMEOUT = 3.0
FAST = {'heartbeat_interval_sec': 0.5, 'heartbeat_timeout_sec': TIMEOUT, 'connect_timeout_sec': 2}


def promote(server: EmbeddedPostgres) -> None:
    """Restart it as a standby and promote it: the same data under another timeline."""
    (directory,), = query(server.config('postgres'), "SELECT current_setting('data_directory')")
    server.kill()
    signal_file = Path(directory, 'standby.signal')
    signal_file.touch()
    signal_file.chmod(0o666)
    server.start()
    assert query(server.config('postgres'), 'SELECT pg_promote()') == [(True,)]


@pytest.fixture
def config(own_server: EmbeddedPostgres) -> CoordinationConfig:
    own_server.create_database('failover')
    return own_server.config('failover', **FAST)


def test_each_answer_that_a_claim_depends_on_tells_the_history_and_whether_it_is_settled(
        config: CoordinationConfig, own_server: EmbeddedPostgres) -> None:
    create_schema(config)
    control = Control(config, Tables.of(config), None)

    def ask() -> list[tuple[str, bool]]:
        connection = Connection.open(config, 'n1')
        requests = (Join('n1', 'life', Process('', '', '', 1, ''), 1.0, True), Beat('n1', 'life'), Refresh('n1', 'life'))
        replies = [control.handle(connection, request) for request in requests]
        connection.close()
        found = []
        for reply in replies:
            assert isinstance(reply, (Joined, Beaten, Holdings))
            found.append((reply.history, reply.settled))
        return found

    before = ask()
    assert before == [(before[0][0], True)] * 3
    promote(own_server)
    after = ask()
    assert after == [(after[0][0], False)] * 3 and after[0][0] != before[0][0]
    connection = Connection.open(config, 'n1')
    assert control.handle(connection, RecordHistory(before[0][0])) is True
    assert ask() == after, 'a late statement of another history changes nothing'
    assert control.handle(connection, RecordHistory(after[0][0])) is True
    connection.close()
    assert ask() == [(after[0][0], True)] * 3


def test_a_failover_behind_a_pooler_is_noticed_by_the_next_heartbeat_and_a_new_node_waits_too(
        config: CoordinationConfig, own_server: EmbeddedPostgres, make_pgbouncer: Callable[..., PgBouncer]) -> None:
    pooler = make_pgbouncer(config)
    pooled = dataclasses.replace(config, host=pooler.host, port=pooler.port, listen=False)
    with Job('n1', pooled, wait_on_enter=0) as first, Job('n2', pooled, wait_on_enter=0) as second:
        eventually(lambda: len(first.my_tokens) == len(second.my_tokens) == config.total_tokens // 2)
        promoted = moment()
        promote(own_server)
        pooler.point_at(config.host, int(config.port))
        eventually(lambda: first._protocol.quarantined and second._protocol.quarantined, timeout=20)
        assert not first.can_claim_task(1) and not second.can_claim_task(1)
        with Job('n3', pooled, wait_on_enter=0) as third:
            assert moment() - promoted >= TIMEOUT, 'it has entered, so that its wait is over'
            jobs = first, second, third
            eventually(lambda: sorted(len(job.my_tokens) for job in jobs) == [3333, 3333, 3334], timeout=30)
        assert query(config, 'SELECT history FROM "{}cluster"') == [(first._protocol._history,)]
        assert first._protocol._history.endswith(' 00000002')


def test_a_new_node_waits_for_one_timeout_where_nobody_has_waited_for_this_history_yet(
        config: CoordinationConfig, own_server: EmbeddedPostgres) -> None:
    with Job('n1', config, wait_on_enter=0):
        pass
    promote(own_server)
    began = moment()
    with Job('fresh', config, wait_on_enter=0) as job:
        assert moment() - began >= TIMEOUT
        eventually(lambda: len(job.my_tokens) == config.total_tokens)
    again = moment()
    with Job('later', config, wait_on_enter=0) as job:
        assert moment() - again < TIMEOUT, 'the wait is recorded, and not repeated'
        eventually(lambda: len(job.my_tokens) == config.total_tokens)


def test_a_role_that_may_not_ask_for_the_history_goes_on_without_it(config: CoordinationConfig) -> None:
    create_schema(config)
    query(config, "CREATE ROLE plain LOGIN PASSWORD 'x'")
    query(config, 'GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO plain')
    query(config, 'GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA public TO plain')
    query(config, 'GRANT USAGE ON ALL SEQUENCES IN SCHEMA public TO plain')
    plain = dataclasses.replace(config, user='plain', password='x')
    with Job('n1', plain, wait_on_enter=0) as job:
        assert job._protocol._history != '', 'PostgreSQL lets everybody ask'
    query(config, 'REVOKE EXECUTE ON FUNCTION pg_control_system() FROM PUBLIC')
    with Job('n1', plain, wait_on_enter=0) as job:
        eventually(lambda: len(job.my_tokens) == config.total_tokens)
        assert job._protocol._history == ''
