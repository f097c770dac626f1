"""Redis, as the duties need it: what nodes that are gone had taken, and queues that are lists."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kombu.connection import Connection
from kombu.utils.uuid import uuid
from redis import Redis

from jobsync_core.worker.broker import search
from jobsync_core.worker.routing import mark_key

from ..broker.broker import CeleryBroker, RouteOf
from ..broker.forwarding import Forwarder
from ..broker.queues import Queues
from .carried_over import CarriedOver
from .keys import SHARED, key_pattern, node_options, queue_of_key
from .restoring import RestoringQoS, restoring

if TYPE_CHECKING:
    from celery import Celery

__all__ = ['RedisBroker']

_execute: Any = Redis.execute_command


class RedisBroker(CeleryBroker):
    """Each node records what it has taken under keys of its own, so that all of it can be restored.

    Args:
        app, queues, forwarder, route_of: As for CeleryBroker.
        carried: What this node's lost connections left.
        receiving: Lets a connection that has not been opened yet take messages without losing one.
    """

    #: An app may want no records; what an evacuation has in hand needs one.
    _transport_options: Mapping[str, Any] = {'ack_emulation': True}

    def __init__(
        self,
        app: Celery,
        queues: Queues,
        forwarder: Forwarder,
        route_of: RouteOf,
        carried: CarriedOver | None = None,
        receiving: Callable[[Connection], Connection] = lambda connection: connection,
    ) -> None:
        super().__init__(app, queues, forwarder, route_of)
        self._carried = carried
        self._receiving = receiving

    def identify(self, make: bool) -> str | None:
        """A mark that a node wrote into this database of the server."""
        with self._app.connection_for_write() as connection:
            channel = connection.default_channel
            if make:
                self._write_mark(channel, uuid())
            found = _command(channel, 'GET', mark_key(self._queues.appname))
            return found.decode() if isinstance(found, bytes) else found

    def mark(self, mark: str) -> None:
        """Write the cluster's mark where the broker has lost it."""
        self._write_mark(self._open(), mark)

    def _write_mark(self, channel: Any, mark: str) -> None:
        _command(channel, 'SET', mark_key(self._queues.appname), after=(mark, 'NX'))

    def put_back(self, message: Any) -> None:
        """As its base's; it comes next, and is not marked as redelivered."""
        channel = message.channel
        channel.looked_at = message.delivery_tag
        try:
            message.reject(requeue=True)
        finally:
            channel.looked_at = None

    def restore(self, node: str, carried: CarriedOver | None = None) -> int:
        """Restore what a node had taken and not acknowledged; how many messages.

        Args:
            node: The node.
            carried: What its lost connections left.
        """
        options = {**self._transport_options, **node_options(self._queues.appname, node)}
        with restoring(self._app.connection_for_write(transport_options=options)) as connection:
            channel = connection.default_channel
            while carried and carried.acknowledged:
                tag = next(iter(carried.acknowledged))
                channel.qos._remove_from_indices(tag).execute()
                carried.acknowledged.discard(tag)
            while carried and carried.unrecorded:
                tag, message = next(iter(carried.unrecorded.items()))
                # Not if the record was made and only its answer lost.
                _record_command(channel, 'HSETNX', tag, message)
                del carried.unrecorded[tag]
            tags = _record_command(channel, 'HKEYS')
            for tag in tags:
                channel.qos.restore_by_tag(tag)
            return len(tags)

    def restore_own(self, node: str) -> int:
        """Restore what this node's lost connections had taken; how many messages."""
        return self.restore(node, self._carried)

    def restore_shared(self, options: Mapping[str, Any]) -> int:
        """Restore, as kombu does, what plain workers had taken and not acknowledged for longer
        than their visibility timeout.

        Args:
            options: The app's own transport options, without those of this node.

        Returns:
            How many messages were restored.
        """
        channel = self._open()
        qos: Any = RestoringQoS(channel)
        qos._on_collect.cancel()  # it delivers nothing
        count = 0
        restore = qos.restore_by_tag

        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            return restore(*args, **kwargs)

        vars(qos).update(
            {name: options.get(name, default) for name, default in SHARED.items()},
            restore_by_tag=counted,
        )
        qos.restore_visible(num=options.get('unacked_restore_limit'), interval=1)
        return count

    def shared_every(self, options: Mapping[str, Any]) -> float:
        """Seconds between two looks at what plain workers had taken.

        Args:
            options: The app's own transport options.
        """
        timeout = options.get('visibility_timeout', SHARED['visibility_timeout'])
        return max(1.0, min(30.0, float(timeout) / 2))

    def left(self, queues: Mapping[str, str]) -> frozenset[str]:
        """Queues that nodes that are gone may have left something in: in few trips, however many
        they are.
        """
        channel = self._open()

        def any_of(group: Sequence[str]) -> bool:
            taken = (
                node_options(self._queues.appname, queues[each])['unacked_key'] for each in group
            )
            lists = (key for each in group for key in _lists(channel, each))
            return bool(_command(channel, 'EXISTS', *taken, *lists))

        return search(sorted(queues), any_of)

    def size(self, queue: str) -> int:
        """How many messages wait in a queue; of one that is empty, in one command."""
        channel = self._open()
        return super().size(queue) if _command(channel, 'EXISTS', *_lists(channel, queue)) else 0

    def places(self) -> Iterable[str]:
        """Names of queues of this plugin that Redis knows of; there may be some that no table knows
        of.
        """
        channel = self._open()
        prefix = channel.global_keyprefix
        pattern = '*' + key_pattern(f'jobsync.{self._queues.appname}.')
        with channel.conn_or_acquire() as client:
            found = [
                key.decode() if isinstance(key, bytes) else str(key)
                for key in client.scan_iter(match=key_pattern(prefix)[:-1] + pattern, count=1000)
            ]
        names = {queue_of_key(key[len(prefix) :], channel.sep) for key in found}
        return sorted(filter(self._queues.is_of_cluster, names))

    def _prepare(self, connection: Connection) -> Connection:
        return self._receiving(restoring(connection))


def _lists(channel: Any, queue: str) -> list[str]:
    """The lists of a queue, one for each priority."""
    return [channel._q_for_pri(queue, step) for step in channel.priority_steps]


def _command(channel: Any, name: str, *keys: str, after: tuple[str, ...] = ()) -> Any:
    """A command past kombu's client, which knows of the app's key prefix in some commands only."""
    prefix = getattr(channel, 'global_keyprefix', None) or ''
    return _execute(channel.client, name, *(prefix + key for key in keys), *after)


def _record_command(channel: Any, command: str, *arguments: str) -> Any:
    """A command on the record of unacknowledged messages that kombu does not give its
    `global_keyprefix`.
    """
    with channel.conn_or_acquire() as client:
        return _execute(
            client, command, f'{channel.global_keyprefix}{channel.unacked_key}', *arguments
        )
