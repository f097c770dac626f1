"""Hears of a change to what a Redis connection has read, so that a worker with empty queues waits without taking anything.

A blocking BRPOP takes a message off its list while the worker may be busy or be killed: it is in nobody's record then. Redis'
client-side caching (CLIENT TRACKING, Redis 6) tells another connection instead that a list has changed, and takes nothing.
"""
from __future__ import annotations

import ssl
from collections.abc import Callable
from typing import Any

__all__ = ['Bell']

_CHANNEL = '__redis__:invalidate'
_BYTES = 65_536


class Bell:
    """A connection beside another one, to which Redis tells each change to what the other has read; once for each reading.

    Args:
        tracked: The other redis-py connection; nothing may be under way on it.
        connection: A connection of its own, not connected yet.
        hub: kombu's event loop.
        ring: Called in the event loop after a change.

    Raises:
        ResponseError: Redis refuses, or does not know how.
        ConnectionError, OSError: It cannot be reached.
    """

    def __init__(self, tracked: Any, connection: Any, hub: Any, ring: Callable[[], object]) -> None:
        self._connection = connection
        self._hub = hub
        self._ring = ring
        connection.connect()
        try:
            connection.send_command('CLIENT', 'ID')
            number = connection.read_response()
            # Its answers are no more than changes are: something to read.
            connection.send_command('SUBSCRIBE', _CHANNEL)
            tracked.send_command('CLIENT', 'TRACKING', 'ON', 'REDIRECT', number, 'NOLOOP')
            tracked.read_response()
            self._tracked = tracked._sock
            self._socket = connection._sock
            self._socket.setblocking(False)
            hub.add_reader(self._socket, self._hear)
        except BaseException:
            connection.disconnect()
            raise

    def belongs_to(self, connection: Any) -> bool:
        """Whether it hears of this connection: one that redis-py has opened anew is not tracked any more."""
        return connection._sock is self._tracked

    def _hear(self) -> None:
        try:
            heard = self._socket.recv(_BYTES)
        except (BlockingIOError, ssl.SSLWantReadError):
            return
        if not heard:
            raise ConnectionError('Redis has closed the connection that tells of new messages')
        self._ring()

    def close(self) -> None:
        """Hear no more."""
        self._hub.remove_reader(self._socket)
        self._connection.disconnect()
