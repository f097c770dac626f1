"""A broker connection of its own for whoever sends messages while it holds something: each step
takes a bounded time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kombu.exceptions import OperationalError

from .abandoning import abandon

__all__ = ['BrokerAway', 'Publisher']


class BrokerAway(Exception):
    """The message is not known to be sent."""


class Publisher:
    """A producer that connects when it is needed. RabbitMQ confirms each message.

    Args:
        app: The Celery app.
        factory: Makes a producer, as `app.amqp.Producer` does.
        limit_sec: Seconds that connecting, or sending one message, may take.
        check: Called right before a message leaves, after routers and signals have run; what it
            raises stops the message.
    """

    def __init__(self, app: Any, factory: Any, limit_sec: float, check: Callable[[], None]) -> None:
        self._app = app
        self._factory = factory
        self._limit = limit_sec
        self._check = check
        self._producer: Any = None

    @property
    def is_connected(self) -> bool:
        """Whether there is a connection, as far as is known."""
        return self._producer is not None

    def connect(self) -> Any:
        """The producer.

        Raises:
            BrokerAway: The broker cannot be reached.
        """
        if self._producer is None:
            connection = self._app.connection_for_write()
            driver = connection.transport.driver_type
            connection.transport_options = {**self._bounds(driver), **connection.transport_options}
            others = max(0, len(connection.alt or ()) - 1)
            try:
                connection.ensure_connection(
                    max_retries=others, interval_start=0, interval_step=0, timeout=self._limit
                )
            except Exception as error:
                connection.release()
                raise BrokerAway(str(error)) from error
            self._producer = self._factory(connection, auto_declare=False)
            self._producer.publish = self._checked(self._producer.publish, driver)
        return self._producer

    def _bounds(self, driver: str) -> dict[str, Any]:
        if driver == 'amqp':
            # What is read may be the answer to a declaration, which a broker that takes nothing (a
            # memory alarm) does not give.
            return {
                'confirm_publish': True,
                'read_timeout': self._limit,
                'write_timeout': self._limit,
            }
        if driver == 'redis':
            return {'socket_timeout': self._limit, 'socket_connect_timeout': self._limit}
        return {}

    def _checked(self, publish: Callable[..., Any], driver: str) -> Callable[..., Any]:
        def checked(*args: Any, **kwargs: Any) -> Any:
            if driver == 'amqp':
                kwargs.setdefault('confirm_timeout', self._limit)
            self._check()
            return publish(*args, **kwargs)

        return checked

    @property
    def errors(self) -> tuple[type[BaseException], ...]:
        """What is raised where the broker, or the result backend, which is told of each task before
        it is sent, is to blame.
        """
        broker = (
            self._producer.connection.recoverable_connection_errors
            if self._producer is not None
            else ()
        )
        return (
            OperationalError,
            OSError,
            *broker,
            *getattr(self._app.backend, 'connection_errors', ()),
        )

    def close(self) -> None:
        """Drop the connection: after an error it may be in the midst of something."""
        producer, self._producer = self._producer, None
        if producer is not None:
            abandon(producer.connection)
