"""Tasks of the shop."""

# mypy: allow-untyped-decorators
from __future__ import annotations

from celery import current_task

from jobsync_celery import current_execution, exactly_once

from .app import app


@app.task
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


@app.task
def draw(order_id: int) -> str:
    """Draw the order's label, on the node that `jobsync_pins` names; returns that node."""
    return str(current_task.request.hostname)
