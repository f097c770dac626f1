"""Everything that JobSync does in a database, once: for tests of what it needs there, and of what
must not get in its way.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import threading
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import quote

import psycopg2
import psycopg2.extensions
import pytest
from click.testing import CliRunner

from jobsync_core import CoordinationConfig, DuplicateExecution, ExecutionRunning, Job
from jobsync_core.belonging import Belonging, Peer
from jobsync_core.cli.main import jobsync
from jobsync_core.store.connection import Connection
from jobsync_core.store.housekeeping import CHORES, HousekeepingStore
from jobsync_core.store.queues import QueueStore
from jobsync_core.store.schedules import ActiveScheduler, ScheduleStore
from jobsync_core.store.sessions import Sessions
from jobsync_core.store.tables import Tables
from jobsync_core.worker.owners import OwnerMap
from tests.support.waiting import eventually

__all__ = ['Admin', 'admin_of', 'use_everything']

Admin = Callable[..., list[tuple[Any, ...]]]


@contextlib.contextmanager
def admin_of(config: CoordinationConfig) -> Iterator[Admin]:
    """Runs statements by an ordinary path and with ordinary settings, whatever the database's
    defaults are.
    """
    options = (
        'search_path=pg_catalog,public',
        'statement_timeout=0',
        'default_transaction_read_only=off',
        'TimeZone=UTC',
        'default_transaction_isolation=read\\ committed',
        'DateStyle=ISO',
        'standard_conforming_strings=on',
        'row_security=on',
    )
    connection = psycopg2.connect(
        host=config.host,
        port=config.port,
        dbname=config.dbname,
        user=config.user,
        password=config.password,
        options=' '.join(f'-c {option}' for option in options),
    )
    connection.autocommit = True

    def run(sql: str, *params: object) -> list[tuple[Any, ...]]:
        with connection.cursor() as cursor:
            cursor.execute(sql, params or None)
            return cursor.fetchall() if cursor.description else []

    with contextlib.closing(connection):
        yield run


def use_everything(config: CoordinationConfig, admin: Admin) -> None:
    """Join, claim, lock, hand over, execute, evict, sweep, schedule, keep house, look and leave, as
    the config's role.

    Args:
        config: The cluster; nothing else uses its tables.
        admin: Past every obstacle. It makes a table `public.effect` for the effects of
            transactions.
    """
    admin('CREATE TABLE IF NOT EXISTS public.effect (key text)')
    admin(f'GRANT SELECT, INSERT ON public.effect TO "{config.user}"')
    with Job('n1', config, wait_on_enter=0) as first, Job('n2', config, wait_on_enter=0) as second:
        half = config.total_tokens // 2
        eventually(lambda: (len(first.my_tokens), len(second.my_tokens)) == (half, half))
        _claim(first, second)
        _lock(first, config)
        _execute(first, config, admin)
        _join_and_leave(config, first)
        _evict(config, first, admin)
        _look(config, first)
        eventually(lambda: first.drain() and len(first.my_tokens) == 0)
        first.undrain()
        eventually(lambda: (len(first.my_tokens), len(second.my_tokens)) == (half, half))
    _sweep_and_schedule(config)
    assert admin(f'SELECT count(*) FROM {Tables.of(config).node}') == [(0,)]


def _claim(first: Job, second: Job) -> None:
    mine = [task for task in range(100) if first.can_claim_task(task)]
    assert not set(mine) & {task for task in range(100) if second.can_claim_task(task)}
    first.add_task(mine[0])
    first.set_claim(mine[1:3])
    first.write_audit()
    assert second.get_audit() == [{'node': 'n1', 'task_id': str(mine[0])}]
    assert first.owner_of(mine[1]) == 'n1'
    first.add_task(mine[4])  # the promises of the others go with the next hand-over


def _lock(first: Job, config: CoordinationConfig) -> None:
    assert (
        first.register_locks_bulk(
            [('pinned', ['n2'], 'why', 1.0), ('pinned too', ['%'], None, None)]
        )
        == 2
    )
    eventually(lambda: first.owner_of('pinned') == 'n2')
    assert [lock['task_id'] for lock in first.list_locks()] == ['pinned', 'pinned too']
    assert first.explain('pinned')['pattern'] == 'n2'
    assert first.clear_locks_by_creator('n1') == 2
    assert len(first.nodes) == 2 and first.get_coordination_status()


def _execute(first: Job, config: CoordinationConfig, admin: Admin) -> None:
    results: list[object] = []

    def work(number: int) -> None:
        for turn in range(4):
            with first.once(f'key:{number}:{turn}') as execution:
                execution.result = {'turn': turn, 'text': "a\\b'ü"}
            results.append(turn)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(results) == 24
    with pytest.raises(DuplicateExecution) as duplicate, first.once('key:0:1'):
        pass
    assert duplicate.value.result == {'turn': 1, 'text': "a\\b'ü"}
    with pytest.raises(ZeroDivisionError), first.once('broken'):
        raise ZeroDivisionError
    with first.once('broken') as execution:
        assert execution.attempts == 2
        with pytest.raises(ExecutionRunning), first.once('broken'):
            pass
        with execution.transaction() as connection, connection.cursor() as cursor:
            cursor.execute('INSERT INTO public.effect VALUES (%s)', ('broken',))
    with (
        first.once('own cursor') as execution,
        contextlib.closing(
            psycopg2.connect(
                host=config.host,
                port=config.port,
                dbname=config.dbname,
                user=config.user,
                password=config.password,
            )
        ) as connection,
    ):
        with connection, connection.cursor() as cursor:
            _begin_users(cursor)
            cursor.execute('INSERT INTO public.effect VALUES (%s)', ('own cursor',))
            execution.complete(cursor, {'of': 'its own'})
    assert first.release_child(1) == 0
    states = admin(
        f'SELECT key, state FROM {Tables.of(config).execution} WHERE key NOT LIKE %s ORDER BY 1',
        'key:%',
    )
    assert states == [('broken', 'done'), ('own cursor', 'done')]
    assert admin('SELECT key FROM public.effect ORDER BY 1') == [('broken',), ('own cursor',)]


def _begin_users(cursor: psycopg2.extensions.cursor) -> None:
    """Begin a transaction of the user's: where limits are silly, that too takes several tries."""
    for _ in range(20):
        with contextlib.suppress(psycopg2.errors.QueryCanceled):
            cursor.execute('SET LOCAL statement_timeout = 0; SET TRANSACTION READ WRITE')
            return
        cursor.connection.rollback()


def _join_and_leave(config: CoordinationConfig, first: Job) -> None:
    with Job('n3', config, wait_on_enter=0) as third:
        eventually(lambda: len(third.my_tokens) >= config.total_tokens // 3)
    eventually(lambda: len(first.my_tokens) == config.total_tokens // 2)


def _evict(config: CoordinationConfig, first: Job, admin: Admin) -> None:
    node = Tables.of(config).node
    admin(
        f"INSERT INTO {node} (name, incarnation, state, weight, lease_sec) VALUES ('silent', 'a "
        "life', 'active', 0.3333333333333333, 1)"
    )
    eventually(
        lambda: (
            first.get_coordination_status()
            and not admin(f"SELECT 1 FROM {node} WHERE name = 'silent'")
        ),
        timeout=20,
    )
    eventually(lambda: len(first.my_tokens) == config.total_tokens // 2)


def _look(config: CoordinationConfig, first: Job) -> None:
    login = f'{quote(config.user)}:{quote(config.password or "")}'
    url = f'postgresql://{login}@{config.host}:{config.port}/{config.dbname}'
    runner = CliRunner(
        env={
            'JOBSYNC_DATABASE_URL': url,
            'JOBSYNC_APPNAME': config.appname,
            'JOBSYNC_LISTEN': str(config.listen).lower(),
            **({'JOBSYNC_SCHEMA': config.schema} if config.schema else {}),
        }
    )

    def run(*words: str) -> str:
        result = runner.invoke(jobsync, list(words))
        assert result.exit_code == 0, f'{words}: {result.output}'
        return result.output

    assert len(json.loads(run('status', '--json'))['nodes']) == 2
    assert 'n1' in run('status')
    assert 'token' in run('who', 'pinned')
    run('locks', 'add', 'from outside', 'n1', '--expires-in-days', '0.5')
    assert 'from outside' in run('locks', 'list')
    run('locks', 'clear', '--task', 'from outside', '--yes')
    assert 'n1' in run('drain', 'n2', '--dry-run')
    run('drain', 'n2')
    eventually(lambda: len(first.my_tokens) == config.total_tokens)
    run('undrain', 'n2')
    eventually(lambda: len(first.my_tokens) == config.total_tokens // 2)
    assert 'n1' in run('rebalances')
    assert 'own cursor' in run('executions', 'list', '--key', 'own%', '--state', 'done')
    assert 'ZeroDivisionError' in run('executions', 'show', 'broken')
    run('executions', 'forget', 'broken', '--yes')
    assert json.loads(run('executions', 'purge', '--key', 'key:0:%', '--yes', '--json')) == {
        'deleted': 4
    }
    with pytest.raises(ZeroDivisionError), first.once('broken'):
        raise ZeroDivisionError
    assert 'is free' in run('executions', 'retry', '--state', 'failed', '--yes')
    run('init-db')
    run('doctor')


def _sweep_and_schedule(config: CoordinationConfig) -> None:
    tables, sessions = Tables.of(config), Sessions(config, 'jobsync test')
    now = datetime.datetime(2026, 3, 1, 12, 0, 0, 5, tzinfo=datetime.timezone.utc)
    try:
        with Job('n1', config, wait_on_enter=0) as job:
            with sessions.session() as connection:
                QueueStore(connection, tables).record('queue of n1', 'n1', '', Belonging('celery'))
                QueueStore(connection, tables).record(
                    'queue of gone', 'gone', '', Belonging('celery')
                )
                assert QueueStore(connection, tables).peers('n2', 60) == [
                    Peer('n1', Belonging('celery'))
                ]
            with sessions.session() as connection:
                assert [
                    orphan.node for orphan in QueueStore(connection, tables).orphans('celery', 60)
                ] == ['gone']
                assert QueueStore(connection, tables).old_orphans('celery', 60) == []
                assert QueueStore(connection, tables).hold('gone') and QueueStore(
                    connection, tables
                ).is_gone('gone')
                QueueStore(connection, tables).forget(['queue of gone'])
            owners = OwnerMap(sessions, tables)
            owners.refresh()
            place = owners.find('some route')
            assert (
                place is not None
                and place.queue == 'queue of n1'
                and job.token_version == owners.version
            )
        with sessions.session() as connection:
            assert (
                ScheduleStore(connection, tables).learn([('daily', now, 'text')])['daily'].slot
                == now
            )
        with sessions.session() as connection:
            found = ScheduleStore(connection, tables).lock('daily', 1.5)
            assert found is not None and found.runs == 0
            ScheduleStore(connection, tables).advance('daily', now, 'text', True)
            assert ScheduleStore(connection, tables).prune(['daily'], 60) == 0
    finally:
        sessions.close_all()
    active = ActiveScheduler(config, tables)
    assert active.hold() and active.hold()
    active.resign()
    agent = Connection.open(config, 'chores')
    for chore in CHORES:
        HousekeepingStore(agent, tables).run(chore, 100, None)
    agent.close()
