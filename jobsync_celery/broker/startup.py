"""A broker that is not up yet when a worker starts: it waits for it, as Celery does."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from ..logs import get_logger

if TYPE_CHECKING:
    from celery import Celery

__all__ = ['wait_for_broker']

logger = get_logger(__name__)


def wait_for_broker(app: Celery, check: Callable[[], object]) -> None:
    """Wait until the broker can be reached, by Celery's own settings for that.

    `broker_connection_retry_on_startup` (where it is not set, `broker_connection_retry`) and
    `broker_connection_max_retries` hold.

    Args:
        app: The app.
        check: Called now and then; raises to give up, as Celery's `maybe_shutdown` does.

    Raises:
        OperationalError: It cannot, and the settings say that it is not to be waited for (any
            longer).
    """
    retries = app.conf.broker_connection_max_retries
    with contextlib.closing(app.connection_for_read()) as connection:

        def say(error: Exception, seconds: float) -> None:
            logger.error(
                'JobSync: the broker %s cannot be reached: %s -- trying again in %.0f s',
                connection.as_uri(),
                error,
                seconds,
            )

        wanted = app.conf.broker_connection_retry_on_startup
        if wanted is None:
            wanted = app.conf.broker_connection_retry
        if not wanted:
            connection.ensure_connection(max_retries=1, interval_start=0, interval_step=0)
            return
        connection.ensure_connection(say, retries, callback=check)
