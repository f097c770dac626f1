"""Sending a message once more from the task that it was delivered to: the broker confirms the copy
before the original is acknowledged.
"""

from __future__ import annotations

import os
import threading
import weakref
from typing import Any

from celery.exceptions import Ignore, Reject

from ..broker.publisher import BrokerAway, Publisher

__all__ = ['RequeueLater', 'send_again']

#: Seconds that connecting, or sending, may take.
_LIMIT_SEC = 5.0


class RequeueLater(Reject, Ignore):  # type: ignore[misc]  # celery has no types
    """The message of the task goes back to the broker, after a pause. The worker makes the pause,
    which no process of a pool waits for. An Ignore as well, which alone passes
    `autoretry_for=(Exception,)`.
    """


class _Sender:
    """One connection of this process, which its threads share.

    Args:
        app: The Celery app.
    """

    def __init__(self, app: Any) -> None:
        self.pid = os.getpid()
        self._lock = threading.Lock()
        self._publisher = Publisher(app, app.amqp.Producer, _LIMIT_SEC, lambda: None)

    def send(self, signature: Any) -> None:
        if not self._lock.acquire(timeout=_LIMIT_SEC):
            raise BrokerAway('others are waiting for the broker')
        try:
            if self._publisher.is_connected:
                try:
                    self._try(signature)
                    return
                except self._publisher.errors:
                    # the connection may have been idle for long, and lost long ago: once more, over
                    # a new one
                    pass
            self._try(signature)
        finally:
            self._lock.release()

    def _try(self, signature: Any) -> None:
        try:
            signature.apply_async(producer=self._publisher.connect(), retry=False)
        except BaseException:
            self._publisher.close()
            raise


_senders: weakref.WeakKeyDictionary[Any, _Sender] = weakref.WeakKeyDictionary()


def send_again(app: Any, signature: Any) -> None:
    """Send a message; returns when the broker has it. Raises whatever keeps it from being sent.

    Args:
        app: The Celery app.
        signature: The message.
    """
    sender = _senders.get(app)
    if (
        sender is None or sender.pid != os.getpid()
    ):  # a connection of the parent process is not to be used, nor closed
        sender = _senders[app] = _Sender(app)
    sender.send(signature)
