"""Health and metrics of one node over HTTP, for probes and Prometheus; on the standard library's server."""
from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import AF_INET, AF_INET6, SO_REUSEADDR, SOL_SOCKET
from typing import Any

from .errors import ConfigurationError
from .job import Job

__all__ = ['HealthServer', 'node_metrics', 'split_address']

#: Seconds that a client may take.
_PATIENCE = 5.0
_TEXT = 'text/plain; version=0.0.4; charset=utf-8'


def split_address(address: object) -> tuple[str, int]:
    """Host and port of ':8080', '127.0.0.1:8080', '[::1]:8080' or 8080.

    Raises:
        ConfigurationError: It is none of these.
    """
    text = f':{address}' if isinstance(address, int) and not isinstance(address, bool) else address
    if isinstance(text, str):
        host, colon, port = text.rpartition(':')
        if colon and port.isdecimal() and int(port) <= 65535 and (':' not in host or (host[0] == '[' and host[-1] == ']')):
            return host.strip('[]'), int(port)
    raise ConfigurationError(f"http={address!r}: give ':8080', '127.0.0.1:8080', '[::1]:8080' or a port number")


def node_metrics(job: Job, counts: Callable[[], Mapping[str, int]]) -> Callable[[], bytes] | None:
    """What renders a node's metrics; None without the extra `metrics`.

    Args:
        job: The node.
        counts: Gives the adapter's counters by event.
    """
    try:
        from prometheus_client import CollectorRegistry, generate_latest

        from .metrics import JobCollector, MessageCollector
    except ImportError:
        return None
    registry = CollectorRegistry()
    registry.register(JobCollector(job))
    registry.register(MessageCollector(job.node_name, counts))
    return lambda: generate_latest(registry)


class HealthServer:
    """Serves `/health/live`, `/health/ready` and `/metrics` from a thread of its own, until `close()`.

    Args:
        address: Where to listen; port 0 picks a free one.
        ready: Gives what the answer of `/health/ready` shows; ready is a node whose 'lease' and 'consuming' are true.
        metrics: Renders the metrics; None: the extra is not installed.

    Raises:
        ConfigurationError: The address is none, or cannot be listened on.
    """

    def __init__(self, address: str | int, *, ready: Callable[[], Mapping[str, object]], metrics: Callable[[], bytes] | None) -> None:
        host, port = split_address(address)

        class Handler(_Handler):
            status = staticmethod(ready)
            render = staticmethod(metrics) if metrics is not None else None

        class Server(_Server):
            address_family = AF_INET6 if ':' in host else AF_INET

        try:
            self._server = Server((host, port), Handler)
        except OSError as error:
            raise ConfigurationError(
                f'http={address!r}: {error.strerror or error}: choose an address of this machine and a free port') from None
        self.port = int(self._server.server_address[1])
        self._pid = os.getpid()
        self._thread = threading.Thread(target=self._server.serve_forever, name='jobsync-http', daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop serving. In a forked child the parent's server goes on."""
        if os.getpid() == self._pid:
            self._server.shutdown()
            self._thread.join(_PATIENCE)
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    allow_reuse_address = False

    def server_bind(self) -> None:
        # Without HTTPServer's look-up of the host's name, which may take long.
        self.socket.setsockopt(SOL_SOCKET, SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away, or is too slow, is no news."""


class _Handler(BaseHTTPRequestHandler):
    timeout = _PATIENCE
    status: Callable[[], Mapping[str, object]]
    render: Callable[[], bytes] | None

    def do_GET(self) -> None:
        path = self.path.partition('?')[0].rstrip('/')
        if path == '/health/live':
            self._json(200, {'status': 'live'})
        elif path == '/health/ready':
            found = dict(self.status())
            ready = bool(found.get('lease')) and bool(found.get('consuming'))
            self._json(200 if ready else 503, {'status': 'ready' if ready else 'not_ready', **found})
        elif path != '/metrics':
            self._json(404, {'error': 'there are /health/live, /health/ready and /metrics'})
        elif self.render is None:
            self._json(501, {'error': "metrics need the extra: pip install 'jobsync-workers[metrics]'"})
        else:
            self._answer(200, _TEXT, self.render())

    do_HEAD = do_GET

    def _refuse(self) -> None:
        self._json(405, {'error': 'GET and HEAD only'})

    do_POST = do_PUT = do_DELETE = do_PATCH = do_OPTIONS = _refuse

    def _json(self, code: int, value: Mapping[str, object]) -> None:
        self._answer(code, 'application/json', json.dumps(value, default=str).encode())

    def _answer(self, code: int, kind: str, body: bytes) -> None:
        self.send_response(code)
        self.send_header('Content-Type', kind)
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Probes come every few seconds: no log."""
