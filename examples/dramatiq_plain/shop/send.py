"""Sends orders, each of them twice: `python -m shop.send 20`."""

from __future__ import annotations

import os
import sys
from typing import Any

import psycopg2

from .actors import charge, draw

_WAIT_MS = 60_000


def main(count: int) -> None:
    """Make the table of charges, send the orders, and wait for their results."""
    with (
        psycopg2.connect(os.environ['JOBSYNC_DATABASE_URL']) as connection,
        connection.cursor() as cursor,
    ):
        cursor.execute('CREATE TABLE IF NOT EXISTS charge (order_id int, cents int)')
    connection.close()
    sent = [charge.send(order_id, 100 + order_id) for order_id in range(count) for _ in range(2)]
    labels = [draw.send(order_id) for order_id in range(count)]
    print(
        'charged',
        sum(_result(message) for message in sent[::2]),
        'and again',
        sum(_result(message) for message in sent[1::2]),
    )
    print('drawn on', *sorted({_result(message) for message in labels}))


def _result(message: Any) -> Any:
    return message.get_result(block=True, timeout=_WAIT_MS)


if __name__ == '__main__':
    main(int(sys.argv[1]))
