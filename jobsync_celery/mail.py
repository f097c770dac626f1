"""The broker, as the plugin needs it: node queues, forwarding with confirmation, and what a node
that is gone left behind.

On RabbitMQ node queues hang on an exchange of their own, whose alternate exchange leads to the
parked queue: a message for a queue that has gone is parked, not lost. On Redis a queue is a list,
and publishing to it always succeeds.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from amqp.exceptions import NotFound
from kombu.connection import Connection
from kombu.entity import Exchange, Queue
from kombu.serialization import prepare_accept_content
from kombu.transport import virtual
from kombu.utils.json import dumps, loads
from kombu.utils.uuid import uuid

from jobsync_core import clock
from jobsync_core.errors import ConfigurationError
from jobsync_core.logs import get_logger, shown
from jobsync_core.worker.broker import Delivery
from jobsync_core.worker.incoming import Refused, read_name, read_stamps
from jobsync_core.worker.routing import (
    HOME,
    HOPS,
    KEY,
    mark_key,
    node_queue,
    parked_queue,
    unknown_queue,
)

from .abandoning import abandon
from .circuit import Circuit
from .declaring import declare_exchange, declare_queue
from .incoming import read_delivery
from .parts import HAND_OVER, missing

if TYPE_CHECKING:
    from celery import Celery

    from .plugin import JobSync

__all__ = [
    'CeleryMail',
    'Leftovers',
    'Publisher',
    'driver_of',
    'exchange_of',
    'home_of',
    'node_queue_of',
    'redis_options',
]

logger = get_logger(__name__)

#: Seconds that a publish may take; then its connection is dropped and the message stays where it
#: was.
_PUBLISH_SEC = 5.0
#: The same in the event loop.
_LOOP_PUBLISH_SEC = 2.0
#: Seconds after which kombu's Redis transport would deliver an unacknowledged message a second
#: time. The others restore what a dead node held, so that this only has to be longer than any
#: task.
VISIBILITY_SEC = 365 * 86_400
#: Where plain workers record what they have taken, and for how long: kombu's defaults.
_SHARED: dict[str, Any] = {
    'unacked_key': 'unacked',
    'unacked_index_key': 'unacked_index',
    'unacked_mutex_key': 'unacked_mutex',
    'visibility_timeout': 3600,
}
_KEPT = ('correlation_id', 'reply_to', 'priority', 'message_id', 'timestamp', 'type', 'app_id')
_DRIVERS = ('redis', 'amqp', 'memory')
#: Nodes about which Redis is asked with one command.
_NODES_AT_ONCE = 100


@dataclass
class Leftovers:
    """What a node's connections to Redis leave for the next one when they break.

    Args:
        unrecorded: Messages that arrived and are not recorded as unacknowledged yet: delivery tag
            -> the record.
        acknowledged: Delivery tags of messages whose acknowledgement is not confirmed yet.
        asked_at: Since when an answer of Redis has been due, by JobSync's clock; None: none is.
        cut: Breaks the connections of the channel that waits for messages, so that the consumer
            makes others.
    """

    unrecorded: dict[str, str] = field(default_factory=dict)
    acknowledged: set[str] = field(default_factory=set)
    asked_at: float | None = None
    cut: Callable[[], object] = lambda: None

    def ids(self) -> list[str]:
        """The ids of the messages that are not recorded, for people."""
        headers = [loads(record)[0].get('headers') for record in self.unrecorded.values()]
        return [shown(each.get('id') if isinstance(each, dict) else None, 100) for each in headers]


def driver_of(app: Celery) -> str:
    """'redis', 'amqp' or 'memory'.

    Raises:
        ConfigurationError: The broker is another one.
    """
    with app.connection_for_write() as connection:
        driver = str(connection.transport.driver_type)
    if driver not in _DRIVERS:
        raise ConfigurationError(
            f'broker transport {driver!r}: JobSync works with Redis and RabbitMQ; use redis:// or '
            'amqp://'
        )
    return driver


def redis_options(appname: str, node: str) -> dict[str, Any]:
    """Transport options that keep what a node has taken apart from what others have."""
    place = f'{node_queue(appname, node)}.unacked'
    return {
        'unacked_key': place,
        'unacked_index_key': f'{place}_index',
        'unacked_mutex_key': f'{place}_mutex',
    }


def _raw(channel: Any, command: str, *arguments: str) -> Any:
    """A command on the record of unacknowledged messages that kombu does not give its
    `global_keyprefix`.
    """
    from redis import Redis  # RabbitMQ needs none

    execute: Any = Redis.execute_command
    with channel.conn_or_acquire() as client:
        return execute(
            client, command, f'{channel.global_keyprefix}{channel.unacked_key}', *arguments
        )


def exchange_of(plugin: JobSync) -> Exchange:
    """Where node queues hang."""
    if plugin.driver != 'amqp':
        return Exchange('', type='direct')
    name = f'jobsync.{plugin.settings.config.appname}'
    return Exchange(
        name, type='direct', durable=True, arguments={'alternate-exchange': f'{name}.unrouted'}
    )


def node_queue_of(plugin: JobSync, name: str, declare: bool = True) -> Queue:
    """A node's queue: durable, never deleted by the broker, never expiring."""
    arguments = (
        {'x-max-priority': plugin.app.conf.task_queue_max_priority}
        if plugin.app.conf.task_queue_max_priority
        else None
    )
    if plugin.driver != 'amqp':
        arguments = None
    return Queue(
        name,
        exchange_of(plugin),
        routing_key=name,
        durable=True,
        auto_delete=False,
        queue_arguments=arguments,
        no_declare=not declare,
    )


def _plain_command(channel: Any, name: str, *keys: str, after: tuple[str, ...] = ()) -> Any:
    """A command past kombu's client, which knows of the app's key prefix in some commands only."""
    from redis import Redis

    execute: Any = Redis.execute_command
    prefix = getattr(channel, 'global_keyprefix', None) or ''
    return execute(channel.client, name, *(prefix + key for key in keys), *after)


def _groups(items: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def home_of(plugin: JobSync, message: Any) -> str:
    """The queue that a message was taken from, as far as it shows: of a node's queue it is the
    app's default one.
    """
    place = message.delivery_info or {}
    exchange, key = place.get('exchange') or '', place.get('routing_key')
    consumed = plugin.app.amqp.queues.consume_from
    ours = node_queue(plugin.settings.config.appname, '')
    for name, queue in consumed.items():
        if not name.startswith(ours) and (
            (not exchange and name == key)
            or (exchange == queue.exchange.name and key == queue.routing_key)
        ):
            return str(name)
    return str(plugin.app.conf.task_default_queue)


class Publisher:
    """Publishes copies of messages, confirmed by the broker. Threads may share it.

    Args:
        plugin: The plugin.
        patient: Wait for each message, up to 5 seconds; otherwise for one message up to 2, and then
            for none until the broker takes messages again: `BrokerBusy` is raised at once.
    """

    def __init__(self, plugin: JobSync, patient: bool = True) -> None:
        self._plugin = plugin
        self._limit = _PUBLISH_SEC if patient else _LOOP_PUBLISH_SEC
        self._circuit = None if patient else Circuit(self._probe)
        self._hands_over = plugin.driver == 'redis' and not missing((HAND_OVER,))
        self._lock = threading.Lock()
        self._connection: Connection | None = None
        self._producer: Any = None

    def send(self, queue: str, message: Any, headers: dict[str, Any]) -> None:
        """Publish a copy of a message durably; returns when the broker has it. Raises what the
        broker's client raises.

        The message is to be acknowledged then. On Redis that is done with the publishing, and
        acknowledging costs nothing any more.
        """
        with self._lock:
            if self._circuit is not None:
                self._circuit.check()
            began = clock.now()
            try:
                if self._hands_over and getattr(message.channel, 'ack_emulation', False):
                    self._hand_over(queue, message, headers)
                else:
                    self._publish(queue, message, headers)
            except BaseException as error:
                self._drop()
                if self._circuit is not None and clock.now() - began >= self._limit / 2:
                    self._circuit.open(error)
                raise

    def _probe(self) -> None:
        """Whether the broker takes messages: two that go nowhere, confirmed. RabbitMQ takes one of
        a connection in any case.
        """
        connection = self._connect()
        try:
            if self._plugin.driver == 'amqp':
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
        foreign = {
            'x-death',
            'x-delivery-count',
            *(() if getattr(message, 'errors', None) else ('compression',)),
        }
        headers = {name: value for name, value in headers.items() if name not in foreign}
        confirm = {'confirm_timeout': self._limit} if self._plugin.driver == 'amqp' else {}
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
        """Exchange and routing key. Node queues have an exchange of their own; every other queue
        hangs on the default one.
        """
        if self._plugin.driver != 'amqp' or queue.startswith(
            node_queue(self._plugin.settings.config.appname, '')
        ):
            return exchange_of(self._plugin).name, queue
        known = self._plugin.app.amqp.queues
        channel = (self._producer or self._open()).channel
        if queue not in known:
            # From a message's header, and perhaps gone by now: what is sent to a queue that there
            # is not would be lost.
            try:
                channel.queue_declare(queue, passive=True)
                return '', queue
            except NotFound:
                self._drop()
                queue, channel = str(self._plugin.app.conf.task_default_queue), self._open().channel
        known[queue](channel).declare()
        return '', queue

    def _hand_over(self, queue: str, message: Any, headers: dict[str, Any]) -> None:
        """Store the copy and forget the original in one transaction: one trip in place of two."""
        channel = (self._producer or self._open()).channel
        raw = message._raw
        properties = raw['properties']
        copy = {
            **raw,
            'headers': headers,
            'properties': {
                **properties,
                'delivery_tag': uuid(),
                'delivery_info': {
                    **properties.get('delivery_info', {}),
                    'exchange': '',
                    'routing_key': queue,
                },
            },
        }
        with channel.conn_or_acquire() as client, client.pipeline() as pipe:
            pipe.lpush(channel._q_for_pri(queue, channel._get_message_priority(copy)), dumps(copy))
            message.channel.qos._remove_from_indices(message.delivery_tag, pipe)
            forgotten = pipe.execute()[-1]
        if forgotten:
            message.channel = _Forgotten(message.channel)

    def close(self) -> None:
        """Close the connection."""
        if self._circuit is not None:
            self._circuit.close()
        with self._lock:
            self._drop()

    def _open(self) -> Any:
        self._connection = self._connect()
        self._producer = self._connection.Producer()
        return self._producer

    def _connect(self) -> Connection:
        limit = self._limit
        options: dict[str, Any] = {'socket_timeout': limit}
        if self._plugin.driver == 'amqp':
            # What is read may be the answer to a declaration, which a broker that takes nothing (a
            # memory alarm) does not give.
            options = {'confirm_publish': True, 'read_timeout': limit, 'write_timeout': limit}
        connection: Connection = self._plugin.app.connection_for_write(
            connect_timeout=limit, transport_options=options
        )
        return connection

    def _drop(self) -> None:
        connection, self._connection, self._producer = self._connection, None, None
        if connection is not None:
            abandon(connection)


class _Forgotten:
    """In place of the channel of a message that Redis has forgotten: only kombu has to be told that
    it is acknowledged.
    """

    no_ack_consumers = None

    def __init__(self, channel: Any) -> None:
        self._channel = channel

    def basic_ack(self, delivery_tag: str, multiple: bool = False) -> None:
        """Count it as acknowledged, so that the next one may come."""
        virtual.QoS.ack(self._channel.qos, delivery_tag)


class _Letter:
    """A message that a duty took off a queue."""

    def __init__(self, mail: CeleryMail, message: Any) -> None:
        self._mail = mail
        self._message = message
        headers = message.headers if isinstance(message.headers, Mapping) else {}
        self.headers: dict[str, Any] = {
            name: value for name, value in headers.items() if name not in (KEY, HOPS, HOME)
        }
        self.id = shown(headers.get('id'))
        task = read_name(headers.get('task'), 'its task')
        self.task = '' if isinstance(task, Refused) else task
        self.route: str | None
        self.route, self.home = mail.address_of(message)

    def forward(self, queue: str) -> None:
        self._mail.publisher.send(
            queue,
            self._message,
            {
                **self.headers,
                HOPS: 0,
                HOME: self.home,
                **({KEY: self.route} if self.route is not None else {}),
            },
        )
        self._message.ack()

    def requeue(self) -> None:
        self._message.reject(requeue=True)


class CeleryMail:
    """What the duties ask of the broker.

    Args:
        plugin: The plugin.
    """

    def __init__(self, plugin: JobSync) -> None:
        self._plugin = plugin
        self.publisher = Publisher(plugin)
        self.catches_strays = plugin.driver == 'amqp'
        self._connection: Connection | None = None
        self._channel: Any = None

    @property
    def place(self) -> str:
        """The broker's address, without its password."""
        with self._plugin.app.connection_for_write() as connection:
            return str(connection.as_uri())

    def identify(self, make: bool) -> str | None:
        """The mark of the broker: the same by whatever address it is reached, and another for each
        part of it ('' where there is none).

        Args:
            make: Make one where Redis has none; else None then.
        """
        if self._plugin.driver not in ('redis', 'amqp'):
            return ''
        with self._plugin.app.connection_for_write() as connection:
            channel = connection.default_channel
            if self._plugin.driver == 'amqp':
                name = getattr(connection.connection, 'server_properties', {}).get('cluster_name')
                return f'{name} {connection.virtual_host}' if name else ''
            if make:
                self._write_mark(channel, uuid())
            found = _plain_command(channel, 'GET', mark_key(self._plugin.settings.config.appname))
            return found.decode() if isinstance(found, bytes) else found

    def mark(self, mark: str) -> None:
        """See Mail."""
        if self._plugin.driver == 'redis':
            self._write_mark(self._open(), mark)

    def _write_mark(self, channel: Any, mark: str) -> None:
        _plain_command(
            channel, 'SET', mark_key(self._plugin.settings.config.appname), after=(mark, 'NX')
        )

    def declare(self, queue: str) -> None:
        """Make a node's queue, the exchange it hangs on, and the parked queue."""
        appname, plugin = self._plugin.settings.config.appname, self._plugin
        parked: Any
        parked, unknown, own = (
            node_queue_of(plugin, name)
            for name in (parked_queue(appname), unknown_queue(appname), queue)
        )
        with plugin.app.connection_for_write() as connection:
            if plugin.driver != 'amqp':
                for each in (parked, unknown, own):
                    each(connection.default_channel).declare()
                return
            stray = Exchange(f'jobsync.{appname}.unrouted', type='fanout', durable=True)
            for exchange in (stray, exchange_of(plugin)):
                declare_exchange(connection, exchange)
            # The shared ones are never deleted: what comes just then would be lost. Their arguments
            # mean little.
            declare_queue(
                connection,
                Queue(parked.name, stray, durable=True, queue_arguments=parked.queue_arguments),
            )
            for each in (parked, unknown):
                declare_queue(connection, each)
            mine = plugin.app.amqp.queues.get(queue)
            if (
                not declare_queue(connection, own, lambda: self._park_all(queue, parked.name))
                and mine is not None
            ):
                mine.no_declare = True  # its consumer would end the worker

    def _park_all(self, queue: str, parked: str) -> None:
        """Move a queue's messages to the parked ones; no more than there are at first."""
        for _ in range(self.size(queue)):
            letter = self.take(queue)
            if letter is None:
                return
            letter.forward(parked)

    def address_of(self, message: Any) -> tuple[str | None, str]:
        """The route of a message, made from its arguments where its task is known here, and its
        home queue.

        None as its route is what has none, or cannot be right: it goes home, where a gate sets it
        aside or runs it.
        """
        stamps = read_stamps(message.headers)
        home = stamps.home or home_of(self._plugin, message)
        found = read_delivery(message)
        if isinstance(found, Refused):
            return None, home
        if found.task not in self._plugin.app.tasks:
            return stamps.key, home
        route = self._plugin.tasks.route_of(found.task, found.args, found.kwargs, found.id, stamps)
        return (None if isinstance(route, Refused) else route), home

    def restore(self, node: str, left: Leftovers | None = None) -> int:
        """See Mail. RabbitMQ gives back by itself what a lost connection held.

        Args:
            node: The node.
            left: What its lost connections left.
        """
        if self._plugin.driver != 'redis':
            return 0
        appname = self._plugin.settings.config.appname
        from .restoring import restoring  # needs redis

        with restoring(
            self._plugin.app.connection_for_write(transport_options=redis_options(appname, node))
        ) as connection:
            channel = connection.default_channel
            while left and left.acknowledged:
                tag = next(iter(left.acknowledged))
                channel.qos._remove_from_indices(tag).execute()
                left.acknowledged.discard(tag)
            while left and left.unrecorded:
                tag, message = next(iter(left.unrecorded.items()))
                # Not if the record was made and only its answer lost.
                _raw(channel, 'HSETNX', tag, message)
                del left.unrecorded[tag]
            tags = _raw(channel, 'HKEYS')
            for tag in tags:
                channel.qos.restore_by_tag(tag)
            return len(tags)

    def restore_shared(self, options: Mapping[str, Any]) -> int:
        """Put back, as kombu does, what plain workers had taken and not acknowledged for longer
        than their visibility timeout.

        Args:
            options: The app's own transport options, without those of this node.

        Returns:
            How many messages were put back.
        """
        channel = self._open()
        if not channel.ack_emulation:
            return 0
        from .restoring import RestoringQoS

        qos: Any = RestoringQoS(channel)
        qos._on_collect.cancel()  # it delivers nothing
        count = 0
        restore = qos.restore_by_tag

        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            return restore(*args, **kwargs)

        vars(qos).update(
            {name: options.get(name, default) for name, default in _SHARED.items()},
            restore_by_tag=counted,
        )
        qos.restore_visible(num=options.get('unacked_restore_limit'), interval=1)
        return count

    @staticmethod
    def shared_every(options: Mapping[str, Any]) -> float:
        """Seconds between two looks at what plain workers had taken."""
        return max(
            1.0,
            min(30.0, float(options.get('visibility_timeout', _SHARED['visibility_timeout'])) / 2),
        )

    def left(self, queues: Mapping[str, str]) -> frozenset[str]:
        """See Mail. On RabbitMQ queues say so themselves, and are deleted when they are empty."""
        if self._plugin.driver != 'redis':
            return frozenset(queues)
        channel = self._open()
        appname = self._plugin.settings.config.appname
        found: set[str] = set()
        for group in _groups(sorted(queues), _NODES_AT_ONCE):
            places = {
                node: [
                    redis_options(appname, node)['unacked_key'],
                    *(channel._q_for_pri(queues[node], step) for step in channel.priority_steps),
                ]
                for node in group
            }
            if _plain_command(
                channel, 'EXISTS', *(place for node in group for place in places[node])
            ):
                found.update(
                    node for node in group if _plain_command(channel, 'EXISTS', *places[node])
                )
        return frozenset(found)

    def size(self, queue: str) -> int:
        """See Mail."""
        channel = self._open()
        if self._plugin.driver != 'amqp':
            return int(channel._size(queue))
        try:
            return int(channel.queue_declare(queue, passive=True).message_count)
        except self._missing():
            self.reset()
            return 0

    def take(self, queue: str) -> Delivery | None:
        """See Mail."""
        try:
            message = self._get(queue)
        except self._missing():
            self.reset()
            return None
        return _Letter(self, message) if message is not None else None

    def _get(self, queue: str) -> Any:
        """As kombu's `Queue.get`, which raises where a message cannot be decompressed here: its
        owner may be able to.
        """
        channel = self._open()
        message = channel.basic_get(queue=queue, no_ack=False)
        if message is not None:
            convert = getattr(channel, 'message_to_python', None)
            message = convert(message) if convert is not None else message
            message.accept = prepare_accept_content(self._plugin.app.conf.accept_content)
        return message

    def delete(self, queue: str) -> bool:
        """See Mail."""
        try:
            self._open().queue_delete(queue, if_unused=True, if_empty=True)
        except self._missing():
            self.reset()
            return False
        return True

    def reset(self) -> None:
        """See Mail."""
        connection, self._connection, self._channel = self._connection, None, None
        if connection is not None:
            abandon(connection)

    def close(self) -> None:
        """Close all connections."""
        self.reset()
        self.publisher.close()

    def _open(self) -> Any:
        if self._channel is None:
            connection = self._plugin.app.connection_for_write(connect_timeout=_PUBLISH_SEC)
            if self._plugin.driver == 'redis':
                from .restoring import restoring

                restoring(connection)
            self._connection = self._plugin.receiving(connection)
            self._channel = self._connection.default_channel
        return self._channel

    def _missing(self) -> tuple[type[BaseException], ...]:
        if self._connection is None:
            return ()
        return tuple(self._connection.channel_errors)
