"""Actors of the shop: `dramatiq shop.actors`."""

from __future__ import annotations

import dramatiq

from jobsync_dramatiq import current_execution, exactly_once

from .broker import jobsync


@dramatiq.actor(store_results=True)
@exactly_once(key='order:{order_id}')
def charge(order_id: int, cents: int) -> int:
    """Charge an order. The row and the record that the key is complete are one transaction: both
    are there, or neither.
    """
    execution = current_execution()
    execution.result = cents
    with execution.transaction() as connection, connection.cursor() as cursor:
        cursor.execute('INSERT INTO charge (order_id, cents) VALUES (%s, %s)', (order_id, cents))
    return cents


@dramatiq.actor(store_results=True)
def draw(order_id: int) -> str:
    """Draw the order's label, on a node that `pins` names; returns that node."""
    assert jobsync.job is not None  # in a worker
    return jobsync.job.node_name
