"""Passing a message on: a copy of it is published, and confirmed by the broker."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from amqp.exceptions import NotFound

from jobsync_core import clock
from jobsync_core.worker.returns import COUNT, returns_of
from jobsync_core.worker.routing import REDELIVERED, REFUSED, RETURNS

from .abandoning import abandon
from .circuit import Circuit
from .deaths import as_it_came, of_copy
from .declaring import is_no_queue
from .queues import Queues

if TYPE_CHECKING:
    from celery import Celery
    from kombu.connection import Connection

__all__ = ['CONNECT_SEC', 'Forwarder']

#: Seconds that connecting, or publishing, may take; then the connection is dropped and the message
#: stays where it was.
CONNECT_SEC = 5.0
#: The same in the event loop.
_LOOP_SEC = 2.0
_KEPT = ('correlation_id', 'reply_to', 'priority', 'message_id', 'timestamp', 'type', 'app_id')


class Forwarder:
    """Publishes copies of messages, confirmed by the broker. Threads may share it.

    Args:
        app: The app.
        queues: The cluster's.
        patient: Wait for each message, up to 5 seconds; otherwise for one message up to 2, and then
            for none until the broker takes messages again: `BrokerBusy` is raised at once.
    """

    def __init__(self, app: Celery, queues: Queues, patient: bool = True) -> None:
        self._app = app
        self._queues = queues
        self._confirms = queues.driver == 'amqp'
        self._limit = CONNECT_SEC if patient else _LOOP_SEC
        self._circuit = None if patient else Circuit(self._probe)
        self._lock = threading.Lock()
        self._connection: Connection | None = None
        self._producer: Any = None

    def send(self, queue: str, message: Any, headers: dict[str, Any]) -> None:
        """Publish a copy of a message durably; returns when the broker has it. Raises what the
        broker's client raises.

        The message is to be acknowledged then. On Redis that is done with the publishing, and
        acknowledging costs nothing any more.
        """
        if message.delivery_info.get('redelivered'):
            headers = {**headers, REDELIVERED: True}
        with self._lock:
            if self._circuit is not None:
                self._circuit.check()
            began = clock.now()
            try:
                self._publish(queue, message, headers)
            except BaseException as error:
                self._drop()
                if self._circuit is not None and clock.now() - began >= self._limit / 2:
                    self._circuit.open(error)
                raise

    def close(self) -> None:
        """Close the connection."""
        if self._circuit is not None:
            self._circuit.close()
        with self._lock:
            self._drop()

    def _probe(self) -> None:
        """Whether the broker takes messages: two that go nowhere, confirmed. RabbitMQ takes one of
        a connection in any case.
        """
        connection = self._connect()
        try:
            if self._confirms:
                producer = connection.Producer()
                for _ in range(2):
                    producer.publish(
                        b'',
                        exchange='',
                        routing_key='jobsync.nowhere',
                        retry=False,
                        confirm_timeout=self._limit,
                        content_type='text/plain',
                        content_encoding='utf-8',
                    )
            else:
                channel: Any = connection.default_channel
                channel.client.ping()
        finally:
            abandon(connection)

    def _publish(self, queue: str, message: Any, headers: dict[str, Any]) -> None:
        properties = message.properties
        given = {name: properties[name] for name in _KEPT if properties.get(name) is not None}
        if message.delivery_info.get('priority') is not None:
            given.setdefault('priority', message.delivery_info['priority'])
        if properties.get('expiration') is not None:
            given['expiration'] = float(properties['expiration']) / 1000
        # What a broker adds to headers is not the message's own; nor is the compression of a body
        # that has been decompressed here.
        foreign = {COUNT, RETURNS, *(() if getattr(message, 'errors', None) else ('compression',))}
        headers = {name: value for name, value in of_copy(headers).items() if name not in foreign}
        returns = returns_of(as_it_came(message))
        if returns and not headers.get(REFUSED):
            headers[RETURNS] = returns
        confirm = {'confirm_timeout': self._limit} if self._confirms else {}
        exchange, queue = self._way_to(queue)
        producer = self._producer or self._open()
        producer.publish(
            message.body,
            exchange=exchange,
            routing_key=queue,
            headers=headers,
            retry=False,
            delivery_mode=2,
            content_type=message.content_type,
            content_encoding=message.content_encoding,
            **given,
            **confirm,
        )

    def _way_to(self, queue: str) -> tuple[str, str]:
        """Exchange and routing key. Node queues have exchanges of their own; every other queue
        hangs on the default one.
        """
        if not self._confirms or self._queues.is_of_cluster(queue):
            return self._queues.way_to(queue)
        known = self._app.amqp.queues
        channel = (self._producer or self._open()).channel
        if queue not in known:
            # From a message's header, and perhaps gone by now: what is sent to a queue that there
            # is not would be lost.
            try:
                channel.queue_declare(queue, passive=True)
                return '', queue
            except NotFound as error:
                if not is_no_queue(error):
                    raise
                self._drop()
                queue, channel = str(self._app.conf.task_default_queue), self._open().channel
        known[queue](channel).declare()
        return '', queue

    def _open(self) -> Any:
        self._connection = self._connect()
        self._producer = self._connection.Producer()
        return self._producer

    def _connect(self) -> Connection:
        limit = self._limit
        options: dict[str, Any] = {'socket_timeout': limit}
        if self._confirms:
            # What is read may be the answer to a declaration, which a broker that takes nothing (a
            # memory alarm) does not give.
            options = {'confirm_publish': True, 'read_timeout': limit, 'write_timeout': limit}
        connection: Connection = self._app.connection_for_write(
            connect_timeout=limit, transport_options=options
        )
        return connection

    def _drop(self) -> None:
        connection, self._connection, self._producer = self._connection, None, None
        if connection is not None:
            abandon(connection)
