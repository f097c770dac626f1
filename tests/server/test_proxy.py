"""The proxy itself: what each kind of broken network does to a connection."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest

from tests.support.proxy import Mode, Proxy
from tests.support.waiting import eventually


class Echo:
    """A server that sends everything back, and remembers it."""

    def __init__(self) -> None:
        self.heard = b''
        self._listener = socket.create_server(('127.0.0.1', 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Accept no more."""
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                link, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._echo, args=(link,), daemon=True).start()

    def _echo(self, link: socket.socket) -> None:
        with link:
            try:
                while data := link.recv(65536):
                    self.heard += data
                    link.sendall(data)
            except ConnectionError:
                pass


@pytest.fixture
def echo() -> Iterator[Echo]:
    echo = Echo()
    yield echo
    echo.close()


@pytest.fixture
def proxy(echo: Echo) -> Iterator[Proxy]:
    with Proxy('127.0.0.1', echo.port) as proxy:
        yield proxy


@pytest.fixture
def client(proxy: Proxy) -> Iterator[socket.socket]:
    """A connection that has been used once."""
    with socket.create_connection((proxy.host, proxy.port), timeout=5) as client:
        client.sendall(b'a')
        assert client.recv(10) == b'a'
        yield client


def silent(client: socket.socket) -> bool:
    """Whether nothing comes for a moment."""
    client.settimeout(0.2)
    try:
        client.recv(10)
    except TimeoutError:
        return True
    finally:
        client.settimeout(5)
    return False


def test_what_is_held_arrives_at_the_heal(proxy: Proxy, client: socket.socket, echo: Echo) -> None:
    proxy.switch(Mode.HOLD)
    client.sendall(b'b')
    assert silent(client)
    assert echo.heard == b'a'
    proxy.heal()
    assert client.recv(10) == b'b'


def test_what_is_held_arrives_even_if_its_sender_has_gone(
    proxy: Proxy, client: socket.socket, echo: Echo
) -> None:
    proxy.switch(Mode.HOLD_TO_SERVER)
    client.sendall(b'late')
    client.close()
    proxy.heal()
    eventually(lambda: echo.heard == b'alate')
    eventually(lambda: proxy.connections == 0)


def test_one_way_only(proxy: Proxy, client: socket.socket, echo: Echo) -> None:
    proxy.switch(Mode.HOLD_TO_CLIENT)
    client.sendall(b'b')
    eventually(lambda: echo.heard == b'ab')
    assert silent(client)
    proxy.heal()
    assert client.recv(10) == b'b'


def test_what_is_swallowed_is_lost_and_the_connection_with_it(
    proxy: Proxy, client: socket.socket, echo: Echo
) -> None:
    proxy.switch(Mode.SWALLOW)
    client.sendall(b'b')
    assert silent(client)
    proxy.heal()
    with pytest.raises(ConnectionResetError):
        client.recv(10)
    assert echo.heard == b'a'


@pytest.mark.parametrize('mode', [Mode.HOLD, Mode.SWALLOW])
def test_new_connections_hang_until_the_heal(proxy: Proxy, mode: Mode) -> None:
    proxy.switch(mode)
    with socket.create_connection((proxy.host, proxy.port), timeout=5) as client:
        client.sendall(b'x')
        assert silent(client)
        proxy.heal()
        assert client.recv(10) == b'x'


def test_refused_until_the_heal(proxy: Proxy, client: socket.socket) -> None:
    proxy.switch(Mode.REFUSE)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((proxy.host, proxy.port), timeout=5)
    client.sendall(b'b')
    assert client.recv(10) == b'b'
    proxy.heal()
    socket.create_connection((proxy.host, proxy.port), timeout=5).close()


def test_reset(proxy: Proxy, client: socket.socket) -> None:
    proxy.reset()
    with pytest.raises(ConnectionResetError):
        client.recv(10)


def test_delay_keeps_the_order(proxy: Proxy, client: socket.socket) -> None:
    proxy.switch(Mode.DELAY, 0.1)
    client.sendall(b'1')
    client.sendall(b'2')
    received = b''
    while len(received) < 2:
        received += client.recv(10)
    assert received == b'12'
