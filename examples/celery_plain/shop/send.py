"""Sends orders, each of them twice: `python -m shop.send 20`."""

from __future__ import annotations

import os
import sys

import psycopg2

from .tasks import charge, draw


def main(count: int) -> None:
    """Make the table of charges, send the orders, and wait for their results."""
    with (
        psycopg2.connect(os.environ['JOBSYNC_DATABASE_URL']) as connection,
        connection.cursor() as cursor,
    ):
        cursor.execute('CREATE TABLE IF NOT EXISTS charge (order_id int, cents int)')
    connection.close()
    sent = [charge.delay(order_id, 100 + order_id) for order_id in range(count) for _ in range(2)]
    labels = [draw.delay(order_id) for order_id in range(count)]
    print('charged', sum(result.get(timeout=60) for result in sent[::2]))
    print('drawn on', *sorted({result.get(timeout=60) for result in labels}))


if __name__ == '__main__':
    main(int(sys.argv[1]))
