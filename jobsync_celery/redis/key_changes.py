"""Hears of a change to what a Redis connection has read, so that a worker with empty queues waits
without taking anything.

A blocking BRPOP takes a message off its list while the worker may be busy or be killed: it is in
nobody's record then. Redis' client-side caching (CLIENT TRACKING, Redis 6) tells another connection
instead that a list has changed, and takes nothing.
"""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import Callable
from queue import Empty
from typing import Any

__all__ = ['KeyChangeListener']

_CHANNEL = '__redis__:invalidate'
_BYTES = 65_536
#: What kombu's table calls the socket, beside BRPOP and LISTEN.
_KIND = 'KEY CHANGE'
_CUT = 'Redis has closed the connection that tells of new messages'


class KeyChangeListener:
    """A connection beside another one, to which Redis tells each change to what the other has read;
    once for each reading.

    Whoever waits for the transport's sockets hears it: the event loop, and a step that drains the
    connection before the loop runs (mingle). So the socket stands in the table of kombu's poller,
    where this object plays the channel that it belongs to.

    Args:
        tracked: The other redis-py connection; nothing may be under way on it.
        connection: A connection of its own, not connected yet.
        poller: The `MultiChannelPoller` of the transport.
        hub: kombu's event loop, which learns of the socket from the poller.
        changed: Called after a change.

    Raises:
        ResponseError: Redis refuses, or does not know how.
        ConnectionError, OSError: It cannot be reached.
    """

    def __init__(
        self, tracked: Any, connection: Any, poller: Any, hub: Any, changed: Callable[[], object]
    ) -> None:
        self._connection = connection
        self._poller = poller
        self._hub = hub
        self._changed = changed
        self.handlers = {_KIND: self.hear}
        connection.connect()
        try:
            connection.send_command('CLIENT', 'ID')
            number = connection.read_response()
            # Its answers are no more than changes are: something to read.
            connection.send_command('SUBSCRIBE', _CHANNEL)
            tracked.send_command('CLIENT', 'TRACKING', 'ON', 'REDIRECT', number, 'NOLOOP')
            tracked.read_response()
            self._tracked = tracked._sock
            self.socket = connection._sock
            self.socket.setblocking(False)
            self.number = self.socket.fileno()
            poller.poller.register(self.number, poller.eventflags)
            poller._fd_to_chan[self.number] = self, _KIND
        except BaseException:
            connection.disconnect()
            raise

    @property
    def qos(self) -> KeyChangeListener:
        """What the poller asks whether there is room: here, always."""
        return self

    def can_consume(self) -> bool:
        """A change is heard whatever the worker has in hand: a socket that stays readable keeps the
        loop busy.
        """
        return True

    def _poll_error(self, kind: str) -> None:
        raise ConnectionError(_CUT)

    def belongs_to(self, connection: Any) -> bool:
        """Whether it hears of this connection: one that redis-py has opened anew is not tracked any
        more.
        """
        return connection._sock is self._tracked

    def hear(self) -> None:
        """Read what Redis has told.

        Raises:
            Empty: What kombu's poller expects of a socket that brought no message.
            ConnectionError: Redis has closed the connection.
        """
        try:
            heard = self.socket.recv(_BYTES)
        except (BlockingIOError, ssl.SSLWantReadError):
            raise Empty from None
        if not heard:
            raise ConnectionError(_CUT)
        self._changed()
        raise Empty

    def close(self) -> None:
        """Hear no more."""
        entry = self._poller._fd_to_chan.get(self.number)
        if entry is None or entry[0] is self:
            self._poller._fd_to_chan.pop(self.number, None)
            self._hub.remove_reader(self.number)
            with contextlib.suppress(
                KeyError, ValueError, OSError
            ):  # the loop has dropped it with its connection
                self._poller.poller.unregister(self.number)
        self._connection.disconnect()
