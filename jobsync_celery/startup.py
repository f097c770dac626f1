"""Servers that are not up yet when a worker starts: it waits for them, as Celery does for its broker."""
from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from jobsync_core import clock
from jobsync_core.errors import DatabaseUnavailable
from jobsync_core.store.connection import Sessions

from .logs import get_logger

if TYPE_CHECKING:
    from celery import Celery

    from jobsync_core.config import CoordinationConfig

__all__ = ['wait_for_broker', 'wait_for_database']

logger = get_logger(__name__)

#: Seconds between two tries to reach the database, and between two lines about it.
_TRY_AGAIN_SEC, _SAY_AGAIN_SEC = 1.0, 10.0


def wait_for_broker(app: Celery, check: Callable[[], object]) -> None:
    """Wait until the broker can be reached, by Celery's own settings for that.

    `broker_connection_retry_on_startup` (where it is not set, `broker_connection_retry`) and `broker_connection_max_retries` hold.

    Args:
        app: The app.
        check: Called now and then; raises to give up, as Celery's `maybe_shutdown` does.

    Raises:
        OperationalError: It cannot, and the settings say that it is not to be waited for (any longer).
    """
    retries = app.conf.broker_connection_max_retries
    with contextlib.closing(app.connection_for_read()) as connection:
        def say(error: Exception, seconds: float) -> None:
            logger.error('JobSync: the broker %s cannot be reached: %s -- trying again in %.0f s', connection.as_uri(), error, seconds)

        wanted = app.conf.broker_connection_retry_on_startup
        if wanted is None:
            wanted = app.conf.broker_connection_retry
        if not wanted:
            connection.ensure_connection(max_retries=1, interval_start=0, interval_step=0)
            return
        connection.ensure_connection(say, retries, callback=check)


def wait_for_database(config: CoordinationConfig, limit_sec: float, check: Callable[[], object], sleep: Callable[[float], Any]) -> None:
    """Wait until the database answers; what it says else is left for entering.

    Args:
        config: Where it is.
        limit_sec: Seconds to wait at most.
        check: Called before each try; raises to give up.
        sleep: Waits for a number of seconds, or less.

    Raises:
        DatabaseUnavailable: It did not answer in time.
    """
    sessions = Sessions(config, 'jobsync start')
    began = said = clock.now()
    first = True
    try:
        while True:
            check()
            try:
                with sessions.session():
                    return
            except DatabaseUnavailable as error:
                now = clock.now()
                if now - began >= limit_sec:
                    raise
                if first or now - said >= _SAY_AGAIN_SEC:
                    first, said = False, now
                    logger.error('JobSync: %s -- waiting for it, for %.0f s at most (wait_for_database_sec)',
                                 ' '.join(str(error).split()), limit_sec - (now - began))
            sleep(_TRY_AGAIN_SEC)
    finally:
        sessions.close_all()
