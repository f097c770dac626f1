"""What a process or a machine that is gone, or has stopped, had locked is free again soon; whoever
meets a lock comes back later.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg2
import psycopg2.extensions
import pytest

from jobsync_core import CoordinationConfig, ExecutionRunning, Job
from jobsync_core.errors import DatabaseUnavailable
from jobsync_core.ledger.cluster import ClusterLedger
from jobsync_core.store.completions import Completion
from jobsync_core.store.connection import Connection
from jobsync_core.store.executions import ExecutionStore
from jobsync_core.store.queues import QueueStore
from jobsync_core.store.sessions import Sessions
from tests.support import attempts as by_hand
from tests.support.cluster import query
from tests.support.pgbouncer import PgBouncer
from tests.support.rows import Rows, rows_of
from tests.support.waiting import eventually

#: A parent that holds a lock in a transaction, and a child that it forked meanwhile and that
#: outlives it.
_ORPHANS = """
import gc, json, os, signal, sys
from jobsync_core.config import CoordinationConfig
from jobsync_core.ledger.cluster import ClusterLedger
from jobsync_core.ledger.once import once
from jobsync_core.store.connection import Connection
from jobsync_core.store.sessions import Sessions
from jobsync_core.store.schema import Tables

kind = sys.argv[1]
config = CoordinationConfig(**json.load(sys.stdin))
sessions = Sessions(config, 'parent')
LOCK = (
    'SET LOCAL idle_in_transaction_session_timeout = 0;'
    ' SELECT pg_backend_pid(), pg_advisory_xact_lock(4711)'
)


def orphan():
    child = os.fork()
    if child:
        return child
    signal.alarm(60)
    nothing = os.open('/dev/null', os.O_WRONLY)
    os.dup2(nothing, 1)
    os.close(nothing)
    try:
        use_what_is_inherited()
    finally:
        os.write(begun[1], b'.')
        os.read(for_ever[0], 1)
        os._exit(0)


def use_what_is_inherited():
    if kind == 'session':
        # What a child may do with what it inherited: nothing of it reaches the parent's
        # connection or a descriptor of its own.
        mine = [os.open('/dev/null', os.O_RDONLY) for _ in range(20)]
        inherited.close()
        globals().pop('inherited')
        gc.collect()
        for number in mine:
            os.fstat(number)
        with sessions.session() as own, own.cursor() as cursor:
            cursor.execute('SELECT 1')
        os.write(fine[1], b'.')


begun, fine, for_ever = os.pipe(), os.pipe(), os.pipe()
if kind == 'session':
    with sessions.session() as inherited, inherited.cursor() as cursor:
        cursor.execute(LOCK)
        backend = cursor.fetchone()[0]
        child = orphan()
        os.read(begun[0], 1)
        cursor.execute('SELECT 1')
        os.set_blocking(fine[0], False)
        assert os.read(fine[0], 1) == b'.'
        print(json.dumps([backend, child]), flush=True)
        os.read(for_ever[0], 1)
elif kind == 'agent':
    connection = Connection.open(config, 'agent')
    connection.execute('BEGIN')
    backend = connection.execute(LOCK)[0][0]
    child = orphan()
    os.read(begun[0], 1)
    print(json.dumps([backend, child]), flush=True)
    os.read(for_ever[0], 1)
else:
    ledger = ClusterLedger(sessions, Tables(config.appname), 'n1', lambda: 'life of n1')
    with (
        once(ledger, 'key') as execution,
        execution.transaction() as connection,
        connection.cursor() as cursor,
    ):
        cursor.execute(LOCK)
        backend = cursor.fetchone()[0]
        child = orphan()
        os.read(begun[0], 1)
        print(json.dumps([backend, child]), flush=True)
        os.read(for_ever[0], 1)
"""


@pytest.fixture
def rows(config: CoordinationConfig) -> Iterator[Rows]:
    with rows_of(config) as found:
        found.node('n1')
        found.node('n2')
        yield found


def fields_of(config: CoordinationConfig) -> str:
    return json.dumps(
        {item.name: getattr(config, item.name) for item in dataclasses.fields(config)}, default=dict
    )


def is_there(config: CoordinationConfig, backend: int) -> bool:
    return bool(query(config, 'SELECT 1 FROM pg_stat_activity WHERE pid = %s', (backend,)))


@pytest.mark.parametrize('kind', ['session', 'agent', 'transaction'])
def test_a_forked_orphan_keeps_nothing_of_its_killed_parent(rows: Rows, kind: str) -> None:
    with subprocess.Popen(
        [sys.executable, '-c', _ORPHANS, kind],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[3],
    ) as parent:
        assert parent.stdin is not None and parent.stdout is not None
        parent.stdin.write(fields_of(rows.config))
        parent.stdin.close()
        backend, orphan = json.loads(parent.stdout.readline())
        try:
            assert is_there(rows.config, backend)
            parent.kill()
            parent.wait()
            eventually(lambda: not is_there(rows.config, backend))
            assert query(rows.config, 'SELECT pg_try_advisory_xact_lock(4711)') == [(True,)]
            os.kill(orphan, 0)  # it lives
        finally:
            os.kill(orphan, signal.SIGKILL)
            parent.kill()


class _Filter(ctypes.Structure):
    _fields_ = [
        ('code', ctypes.c_ushort),
        ('jt', ctypes.c_ubyte),
        ('jf', ctypes.c_ubyte),
        ('k', ctypes.c_uint),
    ]


class _Program(ctypes.Structure):
    _fields_ = [('length', ctypes.c_ushort), ('filter', ctypes.POINTER(_Filter))]


def vanish(descriptor: int) -> None:
    """From now on a socket's machine is gone, as its peer sees it: it takes no packet in,
    acknowledges nothing and sends nothing.
    """
    if not sys.platform.startswith('linux'):
        pytest.skip('only Linux has socket filters')
    drop_all = _Filter(0x06, 0, 0, 0)  # BPF_RET | BPF_K: of each packet keep 0 bytes
    program = _Program(1, ctypes.pointer(drop_all))
    with socket.socket(fileno=os.dup(descriptor)) as duplicate:
        duplicate.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 0)
        duplicate.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 0)
        so_attach_filter = 26
        duplicate.setsockopt(socket.SOL_SOCKET, so_attach_filter, bytes(program))


def test_the_fixture_makes_a_machine_vanish_that_a_server_without_keepalives_waits_for(
    config: CoordinationConfig,
) -> None:
    connection = psycopg2.connect(
        host=config.host,
        port=config.port,
        dbname=config.dbname,
        user=config.user,
        password=config.password,
    )
    with connection.cursor() as cursor:
        cursor.execute('SELECT pg_advisory_xact_lock(4711)')
    vanish(connection.fileno())
    deadline = time.monotonic() + 6
    while time.monotonic() < deadline:
        assert query(config, 'SELECT pg_try_advisory_xact_lock(4711)') == [(False,)]
        select.select([], [], [], 0.5)
    query(config, 'SELECT pg_terminate_backend(%s)', (connection.info.backend_pid,))


class TestAMachineThatVanished:
    """The heartbeat timeout is 1 s here: the server asks after one second of silence, and gives up
    after three questions.
    """

    def test_keeps_a_transaction_of_the_users_and_its_rows_for_no_longer_than_the_keepalive(
        self, rows: Rows
    ) -> None:
        rows.run('CREATE TABLE account (id int PRIMARY KEY, paid int)')
        rows.run('INSERT INTO account VALUES (7, 0)')
        here, there = Sessions(rows.config, 'here'), Sessions(rows.config, 'there')
        mine = ClusterLedger(there, rows.tables, 'n1', lambda: 'life of n1')
        execution = by_hand.begin(mine, 'pay:7', 60)
        lost = execution.transaction()
        gone = lost.__enter__()
        with gone.cursor() as cursor:
            cursor.execute('UPDATE account SET paid = paid + 1 WHERE id = 7')
        backend = gone.info.backend_pid
        vanish(gone.fileno())
        rows.run(f"DELETE FROM {rows.tables.node} WHERE name = 'n1'")  # as the leader does
        began = time.monotonic()
        again = by_hand.begin(
            ClusterLedger(here, rows.tables, 'n2', lambda: 'life of n2'), 'pay:7', 60
        )
        with again.transaction() as connection, connection.cursor() as cursor:
            cursor.execute(
                "SET LOCAL statement_timeout = '20s'"
            )  # a failure of the test, not a hang
            cursor.execute('UPDATE account SET paid = paid + 1 WHERE id = 7')
        assert time.monotonic() - began < 15
        assert not is_there(rows.config, backend)
        assert rows.run('SELECT paid FROM account') == [(1,)]
        gone.cut_off()  # type: ignore[attr-defined]  # so that the end of the block has nobody to wait for
        with pytest.raises(DatabaseUnavailable):
            lost.__exit__(None, None, None)
        here.close_all()

    def test_keeps_the_agents_connection_no_longer(self, config: CoordinationConfig) -> None:
        connection = Connection.open(config, 'n1')
        connection.execute('SET idle_in_transaction_session_timeout = 0; BEGIN')
        ((backend,),) = connection.execute('SELECT pg_backend_pid()')
        vanish(connection.fileno())
        eventually(lambda: not is_there(config, backend))

    def test_behind_a_pooler_keeps_a_lock_for_a_second(
        self, config: CoordinationConfig, make_pgbouncer: Callable[..., PgBouncer]
    ) -> None:
        pooler = make_pgbouncer(config)
        sessions = Sessions(
            dataclasses.replace(config, host=pooler.host, port=pooler.port, listen=False), 'there'
        )
        with (
            contextlib.suppress(DatabaseUnavailable),
            sessions.session() as connection,
            connection.cursor() as cursor,
        ):
            cursor.execute('SELECT pg_advisory_xact_lock(4711)')
            vanish(connection.fileno())
            eventually(
                lambda: query(config, 'SELECT pg_try_advisory_xact_lock(4711)') == [(True,)],
                timeout=10,
            )
            connection.cut_off()  # type: ignore[attr-defined]  # so that the end of the block has nobody to wait for
        sessions.close_all()


class TestAStoppedProcess:
    def test_loses_the_keys_row_soon_after_it_has_written_the_completion(
        self, rows: Rows, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr('jobsync_core.store.executions._COMMIT_SEC', 1)
        sessions = Sessions(rows.config, 'there')
        execution = by_hand.begin(
            ClusterLedger(sessions, rows.tables, 'n1', lambda: 'life of n1'), 'key', 60
        )

        def complete(connection: psycopg2.extensions.connection) -> None:
            began = ExecutionStore(connection, rows.tables).begin_transaction()
            assert ExecutionStore(connection, rows.tables).complete(
                Completion('key', execution.fence, None, 60), began, 1000
            )
            eventually(lambda: not is_there(rows.config, connection.info.backend_pid))

        with (
            pytest.raises(DatabaseUnavailable),
            sessions.session(limited=False, users=True) as connection,
        ):
            complete(connection)
        sessions.close_all()

    def test_may_be_silent_in_a_transaction_of_its_own_for_an_hour_and_not_for_two(
        self, rows: Rows
    ) -> None:
        with (
            Job('n3', rows.config, wait_on_enter=0) as job,
            job.once('key') as execution,
            execution.transaction() as connection,
        ):
            with connection.cursor() as cursor:
                cursor.execute('SHOW idle_in_transaction_session_timeout')
                assert cursor.fetchone() == ('1h',)

    def test_loses_what_a_node_left_to_sweep(
        self, rows: Rows, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr('jobsync_core.store.queues._HOLD_SEC', 1)
        one, other = Sessions(rows.config, 'one'), Sessions(rows.config, 'other')

        def held() -> bool:
            with other.session() as connection:
                return QueueStore(connection, rows.tables).hold('gone')

        def hold(connection: psycopg2.extensions.connection) -> None:
            assert QueueStore(connection, rows.tables).hold('gone')
            assert not held()
            eventually(held)

        with pytest.raises(DatabaseUnavailable), one.session() as connection:
            hold(connection)
        one.close_all()
        other.close_all()


@pytest.mark.parametrize('listen', [True, False])
def test_whoever_begins_a_key_whose_row_is_locked_is_told_to_come_back_later(
    rows: Rows, listen: bool
) -> None:
    config = dataclasses.replace(rows.config, listen=listen)
    sessions = Sessions(config, 'test')
    mine = ClusterLedger(sessions, rows.tables, 'n1', lambda: 'life of n1')
    other = ClusterLedger(sessions, rows.tables, 'n2', lambda: 'life of n2')
    execution = by_hand.begin(mine, 'key', 60)
    with contextlib.closing(
        psycopg2.connect(
            host=config.host,
            port=config.port,
            dbname=config.dbname,
            user=config.user,
            password=config.password,
        )
    ) as connection:
        with connection.cursor() as cursor:
            execution.complete(cursor)  # and is not committed yet
        rows.run(f"DELETE FROM {rows.tables.node} WHERE name = 'n1'")
        began = time.monotonic()
        with pytest.raises(ExecutionRunning):
            by_hand.begin(other, 'key', 60)
        assert time.monotonic() - began < 10
        connection.rollback()
    assert by_hand.begin(other, 'key', 60).attempts == 2
    sessions.close_all()
