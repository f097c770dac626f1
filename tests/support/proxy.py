"""A TCP proxy between one node and PostgreSQL that misbehaves on demand."""

from __future__ import annotations

import enum
import itertools
import queue
import select
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType

__all__ = ['Mode', 'Proxy']

_CHUNK = 65536
_MOST_BUFFERED = 1 << 20


class Mode(enum.Enum):
    """What the network does.

    While packets are held, connections stay open, new ones hang, and nothing arrives; what was sent
    arrives when the network heals, as TCP's retransmissions do: so a statement can reach the server
    long after its sender gave it up. Swallowed packets never arrive: at the heal such connections
    are reset.
    """

    PASS = 'pass'
    HOLD = 'hold both ways'
    HOLD_TO_SERVER = 'hold what the node sends'
    HOLD_TO_CLIENT = 'hold what the server sends'
    SWALLOW = 'swallow both ways'
    SWALLOW_TO_SERVER = 'swallow what the node sends'
    SWALLOW_TO_CLIENT = 'swallow what the server sends'
    REFUSE = 'refuse new connections'
    DELAY = 'deliver late'


_HOLDS_TO_SERVER = frozenset({Mode.HOLD, Mode.HOLD_TO_SERVER})
_HOLDS_TO_CLIENT = frozenset({Mode.HOLD, Mode.HOLD_TO_CLIENT})
_SWALLOWS_TO_SERVER = frozenset({Mode.SWALLOW, Mode.SWALLOW_TO_SERVER})
_SWALLOWS_TO_CLIENT = frozenset({Mode.SWALLOW, Mode.SWALLOW_TO_CLIENT})


@dataclass
class _Way:
    """Bytes from `source` to `sink`, each chunk with the moment from which it may be delivered."""

    source: socket.socket
    sink: socket.socket
    to_server: bool
    chunks: deque[tuple[float, bytes]] = field(default_factory=deque)
    size: int = 0
    ended: bool = False  # the source will send no more
    closed: bool = False  # the sink has been told so


@dataclass
class _Link:
    client: socket.socket
    server: socket.socket
    ways: tuple[_Way, _Way]
    broken: bool = False  # bytes were swallowed: the stream cannot go on
    number: int = field(default_factory=itertools.count().__next__)


class Proxy:
    """Listens on a port of its own and passes on to (host, port).

    Args:
        host, port: The PostgreSQL server.
        tap: Told of all that passes: a number for the connection, whether it goes to the server,
            and the bytes.
    """

    def __init__(
        self, host: str, port: int, tap: Callable[[int, bool, bytes], None] | None = None
    ) -> None:
        self.target = (host, port)
        self._tap = tap
        self._delay = 0.0
        self._mode = Mode.PASS
        self._listener: socket.socket | None = self._listen(0)
        self.host, self.port = '127.0.0.1', int(self._listener.getsockname()[1])
        self._waiting: list[socket.socket] = []  # accepted while the network is down
        self._stranded: list[socket.socket] = []
        self._links: list[_Link] = []
        self._changes: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._wake_receiver, self._wake_sender = socket.socketpair()
        self._wake_receiver.setblocking(False)
        self._closing = False
        self._thread = threading.Thread(target=self._run, name=f'proxy-{self.port}', daemon=True)
        self._thread.start()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def mode(self) -> Mode:
        """What the network does now."""
        return self._mode

    def switch(self, mode: Mode, delay: float = 0.0) -> None:
        """Let the network do this from now on; when the call returns, it does.

        Args:
            mode: What to do.
            delay: Seconds by which DELAY delivers late, each way.
        """

        def change() -> None:
            self._mode, self._delay = mode, delay
            if mode is Mode.REFUSE and self._listener is not None:
                self._listener.close()
                self._listener = None
            elif mode is not Mode.REFUSE and self._listener is None:
                self._listener = self._listen(self.port)
            for link in [link for link in self._links if link.broken and not self._swallows()]:
                self._drop(link, reset=True)

        self._do(change)

    def heal(self) -> None:
        """Let everything pass."""
        self.switch(Mode.PASS)

    def reset(self) -> None:
        """Reset every open connection, once."""

        def change() -> None:
            for link in list(self._links):
                self._drop(link, reset=True)

        self._do(change)

    def strand(self) -> None:
        """Never answer on the connections that are open now, and never end them, as a router does
        that has forgotten them.
        """

        def change() -> None:
            for link in self._links:
                link.server.close()
                self._stranded.append(link.client)
            self._links.clear()

        self._do(change)

    @property
    def connections(self) -> int:
        """How many connections are open."""
        return len(self._links) + len(self._waiting)

    def close(self) -> None:
        """End the thread and close everything."""

        def change() -> None:
            self._closing = True

        self._do(change)
        self._thread.join(10)
        for link in list(self._links):
            self._drop(link)
        for client in (*self._waiting, *self._stranded):
            client.close()
        self._waiting.clear()
        self._stranded.clear()
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        self._wake_receiver.close()
        self._wake_sender.close()

    def _do(self, change: Callable[[], None]) -> None:
        """Have the thread, which alone touches the sockets, make a change, and wait until it
        has.
        """
        done = threading.Event()

        def run() -> None:
            change()
            done.set()

        self._changes.put(run)
        self._wake_sender.send(b'.')
        if not done.wait(10):
            raise RuntimeError('the proxy does not run')

    @staticmethod
    def _listen(port: int) -> socket.socket:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(('127.0.0.1', port))
        listener.listen(64)
        listener.setblocking(False)
        return listener

    def _swallows(self) -> bool:
        return self._mode in _SWALLOWS_TO_SERVER or self._mode in _SWALLOWS_TO_CLIENT

    def _run(self) -> None:
        while not self._closing:
            if self._mode not in _HOLDS_TO_SERVER and not self._swallows():
                for client in self._waiting:
                    self._connect(client)
                self._waiting.clear()
            readers, writers, pause = self._interests()
            readable, writable, _ = select.select(readers, writers, [], pause)
            self._serve(frozenset(readable), frozenset(writable))
            while not self._changes.empty():
                self._changes.get()()

    def _interests(self) -> tuple[list[socket.socket], list[socket.socket], float]:
        readers, writers, pause = [self._wake_receiver], [], 1.0
        if self._listener is not None:
            readers.append(self._listener)
        now = time.monotonic()
        for way in (way for link in self._links for way in link.ways):
            if self._holds(way):
                continue
            if not way.ended and way.size < _MOST_BUFFERED:
                readers.append(way.source)
            if way.chunks and way.chunks[0][0] <= now:
                writers.append(way.sink)
            elif way.chunks:
                pause = min(pause, way.chunks[0][0] - now)
        return readers, writers, pause

    def _holds(self, way: _Way) -> bool:
        return self._mode in (_HOLDS_TO_SERVER if way.to_server else _HOLDS_TO_CLIENT)

    def _swallows_way(self, way: _Way) -> bool:
        return self._mode in (_SWALLOWS_TO_SERVER if way.to_server else _SWALLOWS_TO_CLIENT)

    def _serve(
        self, readable: frozenset[socket.socket], writable: frozenset[socket.socket]
    ) -> None:
        if self._wake_receiver in readable:
            self._wake_receiver.recv(_CHUNK)
        if self._listener in readable:
            self._accept()
        for link in list(self._links):
            try:
                for way in link.ways:
                    if self._holds(way):
                        continue
                    if way.source in readable and not way.ended:
                        self._read(link, way)
                    if way.sink in writable and way.chunks:
                        self._write(way)
                    if way.ended and not way.chunks and not way.closed and not link.broken:
                        way.closed = True
                        way.sink.shutdown(socket.SHUT_WR)
            except OSError:
                self._drop(link, reset=True)
                continue
            if all(way.closed for way in link.ways):
                self._drop(link)

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            client, _ = self._listener.accept()
        except OSError:
            return
        client.setblocking(False)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._waiting.append(client)

    def _connect(self, client: socket.socket) -> None:
        try:
            server = socket.create_connection(self.target, timeout=2)
        except OSError:
            _reset(client)
            return
        server.setblocking(False)
        server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._links.append(
            _Link(client, server, (_Way(client, server, True), _Way(server, client, False)))
        )

    def _read(self, link: _Link, way: _Way) -> None:
        try:
            data = way.source.recv(_CHUNK)
        except BlockingIOError:
            return
        if self._swallows_way(way):
            link.broken = True
            way.ended = way.ended or not data
        elif data:
            if self._tap is not None:
                self._tap(link.number, way.to_server, data)
            way.chunks.append(
                (time.monotonic() + (self._delay if self._mode is Mode.DELAY else 0.0), data)
            )
            way.size += len(data)
        else:
            way.ended = True

    @staticmethod
    def _write(way: _Way) -> None:
        due, data = way.chunks.popleft()
        try:
            sent = way.sink.send(data)
        except BlockingIOError:
            sent = 0
        way.size -= sent
        if sent < len(data):
            way.chunks.appendleft((due, data[sent:]))

    def _drop(self, link: _Link, reset: bool = False) -> None:
        if link in self._links:
            self._links.remove(link)
        for side in (link.client, link.server):
            if reset:
                _reset(side)
            else:
                side.close()


def _reset(side: socket.socket) -> None:
    try:
        side.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
    except OSError:
        pass
    side.close()
