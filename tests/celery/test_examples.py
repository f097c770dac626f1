"""The examples are what users copy: they run here as their README says, and they keep their promise
when a worker is killed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg2
import pytest

from jobsync_core import CoordinationConfig
from tests.support.brokers import BrokerServer
from tests.support.cluster import query
from tests.support.waiting import eventually

from .programs import Program, Programs

EXAMPLES = Path(__file__).parents[2] / 'examples'


@pytest.fixture
def start(
    config: CoordinationConfig, redis_server: BrokerServer, tmp_path: Path
) -> Iterator[Callable[[str], Programs]]:
    with contextlib.ExitStack() as stack:

        def make(example: str) -> Programs:
            return stack.enter_context(
                contextlib.closing(Programs(config, redis_server, EXAMPLES / example, tmp_path))
            )

        yield make


def worker(programs: Programs, app: str, name: str) -> Program:
    return programs.start(f'celery -A {app} worker -n {name}@%h -c 2 -l INFO', ' ready.')


def test_the_plain_example_charges_each_order_once(
    start: Callable[[str], Programs], config: CoordinationConfig
) -> None:
    programs = start('celery_plain')
    worker(programs, 'shop.app', 'one')
    worker(programs, 'shop.app', 'gpu-primary')

    printed = programs.run('python -m shop.send 20')

    assert query(
        config, 'SELECT order_id, count(*), min(cents) FROM charge GROUP BY 1 ORDER BY 1'
    ) == [(n, 1, 100 + n) for n in range(20)]
    assert f'charged {sum(100 + n for n in range(20))}\n' in printed
    drawn = next(line for line in printed.splitlines() if line.startswith('drawn on'))
    assert [name.partition('@')[0] for name in drawn.split()[2:]] == ['gpu-primary']
    status = programs.run('celery -A shop.app jobsync status')
    assert 'one@' in status and 'gpu-primary@' in status


def test_the_django_example_books_each_payment_once(
    start: Callable[[str], Programs], config: CoordinationConfig
) -> None:
    programs = start('celery_django')
    programs.run('python manage.py migrate')
    worker(programs, 'billing', 'one')
    worker(programs, 'billing', 'two')

    assert '20 bookings, balance 20\n' in programs.run('python manage.py pay 20')

    assert query(
        config, 'SELECT payment_id, count(*) FROM payments_booking GROUP BY 1 ORDER BY 1'
    ) == [(n, 1) for n in range(20)]
    assert programs.run('python manage.py makemigrations --check --dry-run').endswith(
        'No changes detected\n'
    )


def test_a_payment_is_booked_once_though_its_worker_is_killed_in_the_middle_of_the_transaction(
    start: Callable[[str], Programs], config: CoordinationConfig
) -> None:
    programs = start('celery_django')
    programs.run('python manage.py migrate')
    query(config, 'INSERT INTO payments_account (id, cents) VALUES (7, 0) RETURNING id')
    doomed = worker(programs, 'billing', 'doomed')

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
            programs.run(
                "python manage.py shell -c 'from payments.tasks import book; book.delay(1, 7, 25)'"
            )
            eventually(lambda: waiting_for_the_account() == 1, 20)
            # When: its worker is killed, and another one begins the same payment.
            doomed.kill()
            other = worker(programs, 'billing', 'other')
            eventually(lambda: waiting_for_the_account() == 2, 30)
        connection.rollback()

    # Then: of the two transactions one counts.
    other.wait_for('succeeded in')
    assert query(config, 'SELECT cents FROM payments_account') == [(25,)]
    assert query(config, 'SELECT payment_id, cents FROM payments_booking') == [(1, 25)]
    assert query(config, 'SELECT state, attempts FROM billing_execution') == [('done', 2)]
