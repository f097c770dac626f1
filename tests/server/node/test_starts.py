"""Many nodes that start at once: each holds the cluster's row for one message, waits quietly, and
nobody gives up because others join.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import psycopg2
import pytest

from jobsync_core import CoordinationConfig, Job
from jobsync_core.process import Process
from jobsync_core.protocol.messages.handover import Refresh
from jobsync_core.protocol.messages.membership import Join, JoinReply
from jobsync_core.store.cluster import ClusterStore
from jobsync_core.store.connection import Connection
from jobsync_core.store.layout import LayoutStore
from jobsync_core.store.nodes import NodeStore
from jobsync_core.store.schema import create_schema
from tests.support.cluster import query
from tests.support.rows import rows_of
from tests.support.waiting import eventually

NODES = 60
MakeConfig = Callable[..., CoordinationConfig]


def test_sixty_nodes_that_start_together_all_enter_and_ask_little_while_they_wait(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(
        heartbeat_interval_sec=5, heartbeat_timeout_sec=15, rebalance_check_interval_sec=30
    )
    asked: Counter[str] = Counter()
    looks = 0
    handle, look = ClusterStore.handle, LayoutStore.look

    def counted(self: ClusterStore, connection: Connection, request: Any) -> Any:
        asked[type(request).__name__] += 1
        return handle(self, connection, request)

    def counted_look(*args: Any) -> Any:
        nonlocal looks
        looks += 1
        return look(*args)

    monkeypatch.setattr(ClusterStore, 'handle', counted)
    monkeypatch.setattr(LayoutStore, 'look', counted_look)
    leave, failures, entered = threading.Event(), [], []

    def run(name: str) -> None:
        try:
            with Job(name, config, wait_on_enter=4) as job:
                entered.append(job)
                leave.wait(120)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(f'n{number:02}',)) for number in range(NODES)]
    for thread in threads:
        thread.start()
    try:
        eventually(lambda: query(config, "SELECT to_regclass('sync_node')::text")[0][0], timeout=60)
        eventually(
            lambda: len(query(config, 'SELECT name FROM "{}node"')) == NODES or failures, timeout=60
        )
        waiting = asked['Refresh']
        eventually(lambda: len(entered) == NODES or failures, timeout=60)
        assert not failures
        eventually(
            lambda: (
                query(
                    config,
                    'SELECT sum(upper(tokens) - lower(tokens)) FROM "{}assignment" WHERE node IS '
                    'NOT NULL',
                )[0][0]
                == config.total_tokens
            ),
            timeout=30,
        )
        # Four looks a second for four seconds would be sixteen each.
        assert waiting <= 3 * NODES, asked
        assert asked['Refresh'] <= 9 * NODES, asked
        # The Jobs of one process look at the tables once.
        assert looks <= 3
    finally:
        leave.set()
        for thread in threads:
            thread.join(60)


def test_a_join_into_a_formed_cluster_is_one_message(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cluster's row is held for no round trip of a client that may be slow to answer."""
    config = make_config()
    sent: list[str] = []
    execute = Connection.execute

    def counted(self: Connection, sql: str, *args: Any, **kwargs: Any) -> Any:
        sent.append(sql)
        return execute(self, sql, *args, **kwargs)

    with rows_of(config) as rows:
        control, connection = (
            ClusterStore(config, rows.tables, None),
            Connection.open(config, 'test'),
        )
        try:
            process = Process('here', 'boot', 'ns', 7, '99')
            assert isinstance(
                control.handle(connection, Join('a', 'life of a', process, 1.0, False)), JoinReply
            )
            monkeypatch.setattr(Connection, 'execute', counted)
            for name in 'bc':
                sent.clear()
                assert isinstance(
                    control.handle(connection, Join(name, f'life of {name}', process, 1.0, False)),
                    JoinReply,
                )
                assert len(sent) == 1
            # The same again has happened already; another life of the name is refused.
            assert isinstance(
                control.handle(connection, Join('b', 'life of b', process, 1.0, False)), JoinReply
            )
            assert not isinstance(
                control.handle(connection, Join('b', 'another life', process, 1.0, False)),
                JoinReply,
            )
            assert [
                row[0]
                for row in rows.run(f'SELECT name FROM {rows.tables.node} ORDER BY created_on')
            ] == ['a', 'b', 'c']
            assert control.handle(connection, Refresh('b', 'life of b')) is not None
        finally:
            connection.close()


def test_a_node_that_meets_a_busy_cluster_keeps_its_connection_and_enters_when_it_can(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config()
    create_schema(config)
    opened = []
    joins = 0
    join = NodeStore.join

    def counted_join(*args: Any) -> Any:
        nonlocal joins
        joins += 1
        return join(*args)

    monkeypatch.setattr(NodeStore, 'join', counted_join)
    with pytest.MonkeyPatch.context() as patch:
        open_ = Connection.open.__func__  # type: ignore[attr-defined]

        def counted(cls: type[Connection], *args: Any, **kwargs: Any) -> Connection:
            opened.append(args)
            return open_(cls, *args, **kwargs)  # type: ignore[no-any-return]

        patch.setattr(Connection, 'open', classmethod(counted))
        holder = psycopg2.connect(
            host=config.host,
            port=config.port,
            dbname=config.dbname,
            user=config.user,
            password=config.password,
        )
        entered = threading.Event()

        def run() -> None:
            with Job('late', config, wait_on_enter=0):
                entered.set()

        thread = threading.Thread(target=run)
        try:
            with holder.cursor() as cursor:
                cursor.execute('SELECT FROM sync_cluster FOR UPDATE')
            thread.start()
            eventually(lambda: joins >= 2, timeout=30)
            assert len([args for args in opened if args[1] == 'late']) == 1
            holder.rollback()
            assert entered.wait(30)
        finally:
            holder.close()
            thread.join(30)
        assert len([args for args in opened if args[1] == 'late']) == 1
