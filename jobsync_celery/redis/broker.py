"""Redis, as the duties need it: what nodes that are gone had taken, and queues that are lists."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kombu.connection import Connection
from kombu.utils.uuid import uuid
from redis import Redis

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
#: Nodes about which Redis is asked with one command.
_NODES_AT_ONCE = 100


class RedisBroker(CeleryBroker):
    """Each node records what it has taken under keys of its own, so that all of it can be restored.

    Args:
        app, queues, forwarder, route_of: As for CeleryBroker.
        carried: What this node's lost connections left.
        receiving: Lets a connection that has not been opened yet take messages without losing one.
    """

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

    def restore(self, node: str, carried: CarriedOver | None = None) -> int:
        """Restore what a node had taken and not acknowledged; how many messages.

        Args:
            node: The node.
            carried: What its lost connections left.
        """
        options = node_options(self._queues.appname, node)
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
        if not channel.ack_emulation:
            return 0
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
        """Nodes that may have left something: in few trips, however many they are."""
        channel = self._open()
        found: set[str] = set()
        for group in _groups(sorted(queues), _NODES_AT_ONCE):
            places = {
                node: [
                    node_options(self._queues.appname, node)['unacked_key'],
                    *(channel._q_for_pri(queues[node], step) for step in channel.priority_steps),
                ]
                for node in group
            }
            if _command(channel, 'EXISTS', *(place for node in group for place in places[node])):
                found.update(node for node in group if _command(channel, 'EXISTS', *places[node]))
        return frozenset(found)

    def places(self) -> Iterable[str]:
        """Names of queues of this plugin that Redis knows of; there may be some that no table knows
        of.
        """
        channel = self._open()
        prefix = channel.global_keyprefix
        pattern = key_pattern(f'{prefix}jobsync.{self._queues.appname}.')
        with channel.conn_or_acquire() as client:
            found = [
                key.decode() if isinstance(key, bytes) else str(key)
                for key in client.scan_iter(match=pattern, count=1000)
            ]
        return sorted({queue_of_key(key[len(prefix) :], channel.sep) for key in found})

    def _prepare(self, connection: Connection) -> Connection:
        return self._receiving(restoring(connection))


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


def _groups(items: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
