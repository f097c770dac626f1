"""A relay between a node and PostgreSQL that counts what passes: statements, round trips, rows and
bytes.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

__all__ = ['Counts', 'Meter']

_TRANSACTION_CONTROL = (
    b'BEGIN',
    b'START TRANSACTION',
    b'COMMIT',
    b'ROLLBACK',
    b'SAVEPOINT',
    b'RELEASE',
)


@dataclass
class Counts:
    """What has passed so far.

    statements: completed, BEGIN and COMMIT and the like left out.
    round_trips: times the server said that it was ready for the next query.
    rows: sent to the node.
    sent, received: bytes from and to the node.
    """

    statements: int = 0
    round_trips: int = 0
    rows: int = 0
    sent: int = 0
    received: int = 0

    def since(self, before: Counts) -> dict[str, float]:
        """What passed after `before` was copied."""
        passed = {name: float(getattr(self, name) - getattr(before, name)) for name in vars(self)}
        return {**passed, 'bytes': passed['sent'] + passed['received']}

    def copy(self) -> Counts:
        """The present values."""
        return Counts(**vars(self))


class Meter:
    """Listens on a free port of 127.0.0.1 while entered.

    Args:
        host: Of the PostgreSQL server; a directory means its Unix socket.
        port: Of the server.
    """

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self.counts = Counts()
        self._lock = threading.Lock()
        self._listener = socket.create_server(('127.0.0.1', 0))
        self._sockets: list[socket.socket] = []
        self.port: int = self._listener.getsockname()[1]

    def __enter__(self) -> Meter:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for item in (self._listener, *self._sockets):
            with contextlib.suppress(OSError):
                item.shutdown(socket.SHUT_RDWR)
            item.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = self._connect()
            self._sockets += [near, far]
            threading.Thread(
                target=self._relay, args=(near, far, self._count_sent), daemon=True
            ).start()
            threading.Thread(
                target=self._relay,
                args=(far, near, _Answers(self.counts, self._lock).feed),
                daemon=True,
            ).start()

    def _connect(self) -> socket.socket:
        host, port = self._target
        if host.startswith('/'):
            far = socket.socket(socket.AF_UNIX)
            far.connect(f'{host}/.s.PGSQL.{port}')
            return far
        return socket.create_connection(self._target)

    def _count_sent(self, data: bytes) -> None:
        with self._lock:
            self.counts.sent += len(data)

    @staticmethod
    def _relay(
        source: socket.socket, target: socket.socket, count: Callable[[bytes], None]
    ) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                count(data)
                target.sendall(data)
        for item in (source, target):
            with contextlib.suppress(OSError):
                item.shutdown(socket.SHUT_RDWR)


class _Answers:
    """Reads what the server sends over one connection, message by message."""

    def __init__(self, counts: Counts, lock: threading.Lock) -> None:
        self._counts = counts
        self._lock = lock
        self._rest = b''
        self._started = False

    def feed(self, data: bytes) -> None:
        """Count the messages that are complete with these bytes.

        Raises:
            ValueError: The connection is encrypted, so that nothing can be counted.
        """
        with self._lock:
            self._counts.received += len(data)
            buffer, at = self._rest + data, 0
            while len(buffer) - at >= 5:
                kind = buffer[at : at + 1]
                if not self._started and kind in b'NSG':
                    # Before authentication begins, a lone byte answers a request for encryption.
                    if kind != b'N':
                        raise ValueError(
                            'the server encrypts the connection: measure with a server without TLS'
                        )
                    at += 1
                    continue
                self._started = True
                end = at + 1 + int(struct.unpack_from('!i', buffer, at + 1)[0])
                if end > len(buffer):
                    break
                self._count(kind, buffer[at + 5 : end])
                at = end
            self._rest = buffer[at:]
            if not self._started:
                self._rest = self._rest.lstrip(b'N')

    def _count(self, kind: bytes, body: bytes) -> None:
        if kind == b'C':
            self._counts.statements += not body.startswith(_TRANSACTION_CONTROL)
        elif kind == b'Z':
            self._counts.round_trips += 1
        elif kind == b'D':
            self._counts.rows += 1
