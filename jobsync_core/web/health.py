"""Health and metrics of one node over HTTP, for probes and Prometheus; on the standard library's
server.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs

from .. import clock
from ..errors import ConfigurationError
from ..job import Job
from ..logs import get_logger

__all__ = ['HealthServer', 'backlog_metrics', 'node_metrics', 'split_address']

logger = get_logger(__name__)

#: Seconds that a connection may take in all.
_PATIENCE = 5.0
#: Connections at one time; one more ends the oldest, so that slow clients do not keep probes out.
_MOST = 64
_ADDRESS = re.compile(
    r'(?:(?P<name>[^:\[\]\s/]*)|\[(?P<six>[\w:.%]+)\]):(?P<port>[0-9]{1,5})\Z', re.ASCII
)
_JSON = 'application/json'
_TEXT = 'text/plain; version=0.0.4; charset=utf-8'


def split_address(address: object) -> tuple[str, int]:
    """Host and port of ':8080', '127.0.0.1:8080', '[::1]:8080' or 8080.

    Raises:
        ConfigurationError: It is none of these.
    """
    text = str(address) if isinstance(address, (int, str)) and not isinstance(address, bool) else ''
    found = _ADDRESS.match(f':{text}' if text.isdecimal() else text)
    if found is None or int(found['port']) > 65535:
        raise ConfigurationError(
            f"http={address!r}: give ':8080', '127.0.0.1:8080', '[::1]:8080' or a port number"
        )
    return found['name'] or found['six'] or '', int(found['port'])


def node_metrics(
    job: Job, counts: Callable[[], Mapping[str, int]], waiting: Callable[[], Iterable[Any]] = tuple
) -> Callable[[], bytes] | None:
    """What renders a node's metrics; None without the extra `metrics`.

    Args:
        job: The node.
        counts: Gives the adapter's counters by event.
        waiting: Gives what waits for each queue, as far as it is known.
    """
    try:
        from ..metrics import BacklogCollector, JobCollector, MessageCollector
    except ImportError:
        return None
    return _rendered(
        JobCollector(job), MessageCollector(job.node_name, counts), BacklogCollector(waiting)
    )


def backlog_metrics(waiting: Callable[[], Iterable[Any]]) -> Callable[[], bytes] | None:
    """What renders what waits for each queue; None without the extra `metrics`."""
    try:
        from ..metrics import BacklogCollector
    except ImportError:
        return None
    return _rendered(BacklogCollector(waiting))


def _rendered(*collectors: Any) -> Callable[[], bytes]:
    from prometheus_client import CollectorRegistry, generate_latest

    registry = CollectorRegistry()
    for collector in collectors:
        registry.register(collector)
    return lambda: generate_latest(registry)


class HealthServer:
    """Serves `/health/live`, `/health/ready`, `/metrics` and `/backlog` from a thread of its own,
    until `close()`. Forked children do not serve.

    Args:
        address: Where to listen; port 0 picks a free one.
        ready: Gives what the answer of `/health/ready` shows; ready is a worker whose 'consuming'
            is true.
        metrics: Renders the metrics; None: the extra is not installed.
        live: Whether the node can still come back by itself; where it cannot, `/health/live`
            answers 503: restart the process.
        backlog: Gives what waits for the queue that `/backlog?queue=NAME` names, or for all; None:
            there is nobody who counts.

    Raises:
        ConfigurationError: The address is none, or cannot be listened on.
    """

    def __init__(
        self,
        address: str | int,
        *,
        ready: Callable[[], Mapping[str, object]],
        metrics: Callable[[], bytes] | None,
        live: Callable[[], bool] = lambda: True,
        backlog: Callable[[str | None], Mapping[str, object]] | None = None,
    ) -> None:
        host, port = split_address(address)

        class Handler(_Handler):
            status = staticmethod(ready)
            is_live = staticmethod(live)
            render = staticmethod(metrics) if metrics is not None else None
            count = staticmethod(backlog) if backlog is not None else None

        class Server(_Server):
            address_family = socket.AF_INET6 if ':' in host else socket.AF_INET

        try:
            self._server = Server((host, port), Handler)
        except (OSError, ValueError) as error:  # ValueError: a host name that cannot be encoded
            reason = getattr(error, 'strerror', None) or error
            raise ConfigurationError(
                f'http={address!r}: {reason}: choose an address of this machine and a free port'
            ) from None
        self.port = int(self._server.server_address[1])
        self._pid = os.getpid()
        self._thread = threading.Thread(
            target=self._server.serve_forever, name='jobsync-http', daemon=True
        )
        self._thread.start()
        _servers.add(self)

    def close(self) -> None:
        """Stop serving. Called again, or in a forked child, it does nothing."""
        if os.getpid() != self._pid:
            return
        with contextlib.suppress(OSError):
            # Wakes the thread at once, and ends listening even if a child should have the socket
            # too.
            self._server.socket.shutdown(socket.SHUT_RDWR)
        self._server.shutdown()
        self._thread.join(_PATIENCE)
        self._server.server_close()

    def _forked(self) -> None:
        self._server.forget()


#: Servers of this process: a child must not keep their ports open, for nobody would answer there.
_servers: weakref.WeakSet[HealthServer] = weakref.WeakSet()


def _after_fork() -> None:
    for server in list(_servers):
        server._forked()
    _servers.clear()


os.register_at_fork(after_in_child=_after_fork)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    #: Connections that the system holds until they are accepted: beyond them a client waits for a
    #: second and tries again.
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], handler: type[_Handler]) -> None:
        #: Open connections and since when, oldest first. Other threads only take out their own.
        self._open: dict[Any, float] = {}
        super().__init__(address, handler)

    def server_bind(self) -> None:
        # Without HTTPServer's look-up of the host's name, which may take long.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = (
            str(self.server_address[0]),
            int(self.server_address[1]),
        )

    def process_request(self, request: Any, client_address: Any) -> None:
        if len(self._open) >= _MOST:
            self._end(next(iter(list(self._open)), None))
        self._open[request] = clock.now()
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.pop(request, None)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        """Called twice a second: ends the connections of clients that are too slow."""
        limit = clock.now() - _PATIENCE
        for request, since in list(self._open.items()):
            if since < limit:
                self._end(request)

    def _end(self, request: Any) -> None:
        # The thread that waits for it sees the end of the connection, and closes it.
        self._open.pop(request, None)
        if request is not None:
            with contextlib.suppress(OSError):
                request.shutdown(socket.SHUT_RDWR)

    def server_close(self) -> None:
        super().server_close()
        for request in list(self._open):
            self._end(request)

    def forget(self) -> None:
        """Close this process's copies of the sockets; the connections go on in the parent."""
        for one in (self.socket, *self._open):
            one.close()
        self._open.clear()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away, or is too slow, is no news."""


class _Handler(BaseHTTPRequestHandler):
    status: Callable[[], Mapping[str, object]]
    is_live: Callable[[], bool]
    render: Callable[[], bytes] | None
    count: Callable[[str | None], Mapping[str, object]] | None

    def do_GET(self) -> None:
        path = self.path.partition('?')[0].rstrip('/')
        try:
            code, kind, body = self._look(path)
        except Exception as error:
            logger.exception('%s cannot be answered', path)
            code, kind, body = _json(
                500, {'error': f'{type(error).__name__}; the log of the process tells more'}
            )
        self._answer(code, kind, body)

    do_HEAD = do_GET

    def _look(self, path: str) -> tuple[int, str, bytes]:
        if path == '/health/live':
            live = self.is_live()
            return _json(200 if live else 503, {'status': 'live' if live else 'ended'})
        if path == '/health/ready':
            found = self.status()
            ready = bool(found.get('consuming'))
            return _json(
                200 if ready else 503, {'status': 'ready' if ready else 'not_ready', **found}
            )
        if path == '/backlog' and self.count is not None:
            return self._backlog(self.count)
        if path != '/metrics':
            return _json(
                404, {'error': 'there are /health/live, /health/ready, /metrics and /backlog'}
            )
        if self.render is None:
            return _json(
                501, {'error': "metrics need the extra: pip install 'jobsync-workers[metrics]'"}
            )
        return 200, _TEXT, self.render()

    def _backlog(
        self, count: Callable[[str | None], Mapping[str, object]]
    ) -> tuple[int, str, bytes]:
        given = parse_qs(self.path.partition('?')[2], keep_blank_values=True)
        if set(given) - {'queue'} or len(given.get('queue', [])) > 1 or given.get('queue') == ['']:
            return _json(400, {'error': 'ask for /backlog, or for /backlog?queue=NAME'})
        try:
            return _json(200, count(given['queue'][0] if given else None))
        except Exception as error:  # whatever the broker's client raises
            # Without its text, which may name an address with a password.
            logger.warning('/backlog cannot be answered: %r', error)
            return _json(
                503, {'error': f'{type(error).__name__}; the log of the process tells more'}
            )

    def __getattr__(self, name: str) -> Any:
        if name.startswith('do_'):  # any other method
            return self._refuse
        raise AttributeError(name)

    def _refuse(self) -> None:
        self._answer(*_json(405, {'error': 'GET and HEAD only'}), allow='GET, HEAD')

    def _answer(self, code: int, kind: str, body: bytes, allow: str | None = None) -> None:
        self.send_response(code)
        self.send_header('Content-Type', kind)
        self.send_header('Content-Length', str(len(body)))
        if allow is not None:
            self.send_header('Allow', allow)
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(body)

    def version_string(self) -> str:
        return 'jobsync'

    def log_message(self, format: str, *args: Any) -> None:
        """Probes come every few seconds: no log."""


def _json(code: int, value: Mapping[str, object]) -> tuple[int, str, bytes]:
    return code, _JSON, json.dumps(value, default=str).encode()
