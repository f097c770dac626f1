"""A task that outlasts RabbitMQ's `consumer_timeout`: RabbitMQ closes the channel, and Celery's
worker would end by that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from amqp.exceptions import PreconditionFailed, RecoverableConnectionError

from jobsync_core.worker.consumer_timeout import REMEDY, is_timeout

from .logs import get_logger

__all__ = ['survive']

logger = get_logger(__name__)


def survive(loop: Callable[..., Any]) -> Callable[..., Any]:
    """An event loop of Celery's consumer for which such a channel is as a connection that broke:
    the worker connects anew, its running tasks go on, and RabbitMQ delivers again what it held.
    """

    def lasting_loop(*args: Any) -> Any:
        try:
            return loop(*args)
        except PreconditionFailed as error:
            if not is_timeout(error.reply_code, error.reply_text):
                raise
            logger.warning(
                'JobSync: a task outlasted the consumer_timeout of RabbitMQ, which delivers its '
                'message again. The task goes on, and the worker connects anew; without '
                'exactly_once it runs twice. To prevent it, %s',
                REMEDY,
            )
            raise RecoverableConnectionError(str(error)) from error

    return lasting_loop
