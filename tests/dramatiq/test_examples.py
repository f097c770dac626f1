"""The examples are what users copy: they run here as their README says, and they keep their promise
when a worker is killed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg2
import pytest

from jobsync_core import CoordinationConfig
from jobsync_core.embedded.supervisor import server_processes
from tests.support.brokers import BrokerServer
from tests.support.cluster import query
from tests.support.waiting import eventually

from ..celery.programs import Program, Programs

EXAMPLES = Path(__file__).parents[2] / 'examples'
READY = 'Worker process is ready for action.'


@pytest.fixture
def start(
    config: CoordinationConfig, redis_server: BrokerServer, tmp_path: Path
) -> Iterator[Callable[[str], Programs]]:
    with contextlib.ExitStack() as stack:

        def make(example: str) -> Programs:
            programs = stack.enter_context(
                contextlib.closing(Programs(config, redis_server, EXAMPLES / example, tmp_path))
            )
            programs.environment['BROKER_URL'] = programs.environment['CELERY_BROKER_URL']
            return programs

        yield make


@pytest.fixture
def django(start: Callable[[str], Programs]) -> Programs:
    if importlib.util.find_spec('django_dramatiq') is None:
        pytest.skip('django_dramatiq is not installed; the extra `dev` has it')
    programs = start('dramatiq_django')
    programs.run('python manage.py migrate')
    return programs


def test_the_plain_example_charges_each_order_once(
    start: Callable[[str], Programs], config: CoordinationConfig
) -> None:
    programs = start('dramatiq_plain')
    programs.start('dramatiq shop.actors -p 2 -t 4', READY)
    programs.start('JOBSYNC_NODE_NAME=gpu dramatiq shop.actors -p 1 -t 4', READY)
    all_are_nodes = (
        'SELECT count(DISTINCT node), count(*) FILTER (WHERE moving OR node IS NULL) '
        'FROM shop_assignment'
    )
    eventually(lambda: query(config, all_are_nodes) == [(3, 0)], 30)

    printed = programs.run('python -m shop.send 20')

    total = sum(100 + n for n in range(20))
    assert query(
        config, 'SELECT order_id, count(*), min(cents) FROM charge GROUP BY 1 ORDER BY 1'
    ) == [(n, 1, 100 + n) for n in range(20)]
    assert f'charged {total} and again {total}\n' in printed
    drawn = next(line for line in printed.splitlines() if line.startswith('drawn on'))
    assert [name.partition('@')[0] for name in drawn.split()[2:]] == ['gpu']
    status = programs.run('jobsync --appname shop_ status')
    assert 'gpu@' in status and 'cluster shop_:' in status, status


def test_the_django_example_books_each_payment_once(
    django: Programs, config: CoordinationConfig
) -> None:
    django.start('python manage.py rundramatiq -p 2 -t 4', READY)

    assert '20 bookings, balance 20\n' in django.run('python manage.py pay 20')

    assert query(
        config, 'SELECT payment_id, count(*) FROM payments_booking GROUP BY 1 ORDER BY 1'
    ) == [(n, 1) for n in range(20)]
    assert django.run('python manage.py makemigrations --check --dry-run').endswith(
        'No changes detected\n'
    )
    assert query(config, 'SELECT count(*) FROM billing_node') == [(2,)]


def _kill(program: Program) -> None:
    """End a master and its worker processes, be they its children or a fork server's."""
    pids = [program.process.pid]
    for pid in pids:
        pids.extend(server_processes(pid)[1:])
    program.kill()
    for pid in pids[1:]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_a_payment_is_booked_once_though_its_worker_is_killed_in_the_middle_of_the_transaction(
    django: Programs, config: CoordinationConfig
) -> None:
    query(config, 'INSERT INTO payments_account (id, cents) VALUES (7, 0) RETURNING id')
    doomed = django.start('python manage.py rundramatiq -p 1 -t 2', READY)

    def waiting_for_the_account() -> int:
        return int(
            query(
                config,
                """
            SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE
                'UPDATE%%payments_account%%'
            """,
            )[0][0]
        )

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
            # Given: the booking is inserted, and its transaction waits for the account's row.
            cursor.execute('SELECT FROM payments_account WHERE id = 7 FOR UPDATE')
            django.run(
                "python manage.py shell -c 'from payments.tasks import book; book.send(1, 7, 25)'"
            )
            eventually(lambda: waiting_for_the_account() == 1, 20)
            # When: its worker is killed, and another one begins the same payment.
            _kill(doomed)
            django.start('python manage.py rundramatiq -p 1 -t 2', READY)
            eventually(lambda: waiting_for_the_account() == 2, 30)
        connection.rollback()

    # Then: of the two transactions one counts.
    eventually(
        lambda: query(config, 'SELECT state, attempts FROM billing_execution') == [('done', 2)], 30
    )
    assert query(config, 'SELECT cents FROM payments_account') == [(25,)]
    assert query(config, 'SELECT payment_id, cents FROM payments_booking') == [(1, 25)]
