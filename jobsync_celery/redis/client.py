"""Redis clients that are kept: kombu makes one for each command, which takes longer than the
command itself.
"""

from __future__ import annotations

import functools
from typing import Any

from kombu.connection import Connection, ConnectionPool

__all__ = ['is_redis', 'keep_client', 'with_channel']

_MODULE = 'kombu.transport.redis'


class _Channel:
    """Mixed into a channel of kombu's Redis transport."""

    _kept: Any = None

    def _create_client(self, asynchronous: bool = False) -> Any:
        channel: Any = self
        create: Any = super()._create_client  # type: ignore[misc]  # of the channel that this is mixed into
        if asynchronous:
            return create(asynchronous=True)
        # It has no state but its pool, which is another one after a reconnect or a fork.
        if self._kept is None or self._kept.connection_pool is not channel.pool:
            self._kept = create()
        return self._kept


class _Pool(ConnectionPool):
    def new(self) -> Any:
        """A connection that keeps its clients, too."""
        create: Any = super().new
        return keep_client(create())


def is_redis(transport: Any) -> bool:
    """Whether a transport is kombu's for Redis, or made of it; by name, as redis need not be
    installed.
    """
    return any(cls.__module__ == _MODULE for cls in getattr(transport, 'Channel', object).__mro__)


def with_channel(transport: Any, mixin: type, **attributes: Any) -> Any:
    """A transport whose channels are of `mixin` as well, with more attributes."""
    return type(
        'Transport',
        (transport,),
        {'Channel': type('Channel', (mixin, transport.Channel), attributes)},
    )


@functools.cache
def _keeping(transport: Any) -> Any:
    if not is_redis(transport) or issubclass(transport.Channel, _Channel):
        return transport
    return with_channel(transport, _Channel)


def keep_client(connection: Connection) -> Connection:
    """Let a connection that has not been opened yet, and those of its pools, keep their clients;
    other brokers' are left as they are.
    """
    plain: Any = connection.get_transport_cls
    pool: Any = _Pool
    vars(connection).update(
        get_transport_cls=lambda: _keeping(plain()),
        Pool=lambda limit=None, **options: pool(connection, limit, **options),
    )
    return connection
