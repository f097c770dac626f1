"""Another history of the database, as after the promotion of a standby: noticed wherever a claim
depends on it, and waited out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from jobsync_core import CoordinationConfig, Job
from jobsync_core.embedded.postgres import EmbeddedPostgres
from jobsync_core.process import Process
from jobsync_core.protocol.messages.connection import RecordHistory
from jobsync_core.protocol.messages.handover import Refresh, RefreshReply
from jobsync_core.protocol.messages.membership import Beat, HeartbeatReply, Join
from jobsync_core.store.cluster import ClusterStore
from jobsync_core.store.connection import Connection
from jobsync_core.store.schema import create_schema
from jobsync_core.store.tables import Tables
from tests.support.cluster import node_of, query
from tests.support.history import moment
from tests.support.pgbouncer import PgBouncer
from tests.support.waiting import eventually

TIMEOUT = 3.0
FAST = {'heartbeat_interval_sec': 0.5, 'heartbeat_timeout_sec': TIMEOUT, 'connect_timeout_sec': 2}


def promote(server: EmbeddedPostgres) -> None:
    """Restart it as a standby and promote it: the same data under another timeline."""
    ((directory,),) = query(server.config('postgres'), "SELECT current_setting('data_directory')")
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
    config: CoordinationConfig, own_server: EmbeddedPostgres
) -> None:
    create_schema(config)
    control = ClusterStore(config, Tables.of(config), None)

    def ask(name: str = 'n1') -> tuple[str, str, bool]:
        connection = Connection.open(config, name)
        control.handle(connection, Join(name, 'life', Process('', '', '', 1, ''), 1.0, True))
        beaten, holdings = (
            control.handle(connection, request)
            for request in (Beat(name, 'life'), Refresh(name, 'life'))
        )
        connection.close()
        assert isinstance(beaten, HeartbeatReply) and isinstance(holdings, RefreshReply)
        return beaten.history, holdings.history, beaten.settled

    before = ask()
    assert before == (before[0], before[0], True)
    promote(own_server)
    after = ask()
    assert after == (after[0], after[0], False) and after[0] != before[0]
    connection = Connection.open(config, 'n1')
    for name, life, seen in ((before[0], 'life', 0), (after[0], 'life', 4), (after[0], 'x', 0)):
        late = RecordHistory('n1', life, seen, name)
        assert control.handle(connection, late) is True
        assert ask() == after, (
            f'a statement that belongs to another history changes nothing: {late}'
        )
    assert control.handle(connection, RecordHistory('n1', 'life', 2, after[0])) is True
    connection.close()
    assert ask() == (after[0], after[0], True)
    query(config, 'DELETE FROM "{}node"; DELETE FROM "{}cluster"')
    assert ask() == after, 'the standby may have been copied before the cluster began'
    assert ask('n2') == after, 'nor does the one that is there already settle anything'


def test_a_heartbeat_is_told_whether_the_database_still_has_the_last_answered_one(
    config: CoordinationConfig,
) -> None:
    create_schema(config)
    control = ClusterStore(config, Tables.of(config), None)
    connection = Connection.open(config, 'n1')

    def beat(number: int, seen: int) -> bool:
        reply = control.handle(connection, Beat('n1', 'life', 0, number, seen))
        assert isinstance(reply, HeartbeatReply)
        return reply.same

    def look(seen: int) -> bool:
        reply = control.handle(connection, Refresh('n1', 'life', seen))
        assert isinstance(reply, RefreshReply)
        return reply.same

    def held() -> int:
        ((number,),) = query(config, 'SELECT beat FROM "{}node"')
        return int(number)

    control.handle(connection, Join('n1', 'life', Process('', '', '', 1, ''), 1.0, True))
    assert beat(2, 0) and beat(4, 2) and look(4)
    assert beat(8, 4), 'number 6 never came'
    assert beat(12, 8) and beat(14, 8), 'the answer to number 12 was lost'
    assert beat(10, 8) and held() == 14, 'one that comes late changes nothing'
    query(config, 'UPDATE "{}node" SET beat = 8')  # as in a standby that lacks what came after
    assert not look(14)
    assert not beat(16, 14) and not look(14)
    assert not beat(18, 14), 'a break of which the node has not heard is still one'
    assert held() == 19 and look(19)
    assert beat(20, 19) and look(20)
    connection.close()


def test_a_failover_behind_a_pooler_is_noticed_by_the_next_heartbeat_and_a_new_node_waits_too(
    config: CoordinationConfig,
    own_server: EmbeddedPostgres,
    make_pgbouncer: Callable[..., PgBouncer],
) -> None:
    pooler = make_pgbouncer(config)
    pooled = dataclasses.replace(config, host=pooler.host, port=pooler.port, listen=False)
    with Job('n1', pooled, wait_on_enter=0) as first, Job('n2', pooled, wait_on_enter=0) as second:
        eventually(
            lambda: len(first.my_tokens) == len(second.my_tokens) == config.total_tokens // 2
        )
        promoted = moment()
        promote(own_server)
        pooler.point_at(config.host, int(config.port))
        eventually(
            lambda: node_of(first).protocol.quarantined and node_of(second).protocol.quarantined,
            timeout=20,
        )
        assert not first.can_claim_task(1) and not second.can_claim_task(1)
        with Job('n3', pooled, wait_on_enter=0) as third:
            assert moment() - promoted >= TIMEOUT, 'it has entered, so that its wait is over'
            jobs = first, second, third
            eventually(
                lambda: sorted(len(job.my_tokens) for job in jobs) == [3333, 3333, 3334], timeout=30
            )
        assert query(config, 'SELECT history FROM "{}cluster"') == [
            (node_of(first).protocol.history,)
        ]
        assert node_of(first).protocol.history.endswith(' 00000002')


def test_a_new_node_waits_for_one_timeout_where_nobody_has_waited_for_this_history_yet(
    config: CoordinationConfig, own_server: EmbeddedPostgres
) -> None:
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


def test_a_role_that_may_not_ask_for_the_history_goes_on_without_it(
    config: CoordinationConfig,
) -> None:
    create_schema(config)
    query(config, "CREATE ROLE plain LOGIN PASSWORD 'x'")
    query(config, 'GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO plain')
    query(config, 'GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA public TO plain')
    query(config, 'GRANT USAGE ON ALL SEQUENCES IN SCHEMA public TO plain')
    plain = dataclasses.replace(config, user='plain', password='x')
    with Job('n1', plain, wait_on_enter=0) as job:
        assert node_of(job).protocol.history != '', 'PostgreSQL lets everybody ask'
    query(config, 'REVOKE EXECUTE ON FUNCTION pg_control_system() FROM PUBLIC')
    with Job('n1', plain, wait_on_enter=0) as job:
        eventually(lambda: len(job.my_tokens) == config.total_tokens)
        assert node_of(job).protocol.history == ''
