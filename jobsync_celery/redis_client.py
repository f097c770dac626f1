"""Redis clients that are kept: kombu makes one for each command, which takes longer than the command itself."""
from __future__ import annotations

import functools
from typing import Any

from kombu.connection import Connection, ConnectionPool

__all__ = ['keep_client']

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


@functools.cache
def _keeping(transport: Any) -> Any:
    channel = getattr(transport, 'Channel', object)
    if issubclass(channel, _Channel) or not any(cls.__module__ == _MODULE for cls in channel.__mro__):
        return transport
    return type('Transport', (transport,), {'Channel': type('Channel', (_Channel, channel), {})})


def keep_client(connection: Connection) -> Connection:
    """Let a connection that has not been opened yet, and those of its pools, keep their clients; other brokers' are left as they are."""
    plain: Any = connection.get_transport_cls
    pool: Any = _Pool
    vars(connection).update(
        get_transport_cls=lambda: _keeping(plain()), Pool=lambda limit=None, **options: pool(connection, limit, **options))
    return connection
