"""Real brokers for tests, each on a loopback port of its own: they end with the process that
started them.
"""

from __future__ import annotations

import atexit
import base64
import contextlib
import ctypes
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from jobsync_core.embedded.errors import EmbeddedServerError
from jobsync_core.embedded.redis import redis_program

__all__ = [
    'BrokerServer',
    'BrokerUnavailable',
    'RabbitProgram',
    'RabbitServer',
    'RedisServer',
    'rabbit_program',
]

_HOST = '127.0.0.1'
# Below the range that systems lend to outgoing connections, and away from that of the embedded
# PostgreSQL's tests.
_PORTS = range(10_000, 32_000)
_START_SEC = 60.0
_STOP_SEC = 30.0
# Between two counts that a quorum queue tells of itself; RabbitMQ's own is 5 s.
_TICK_MSEC = 200
_RABBIT_SCRIPTS = (
    Path('/usr/lib/rabbitmq/bin'),
    Path('/usr/local/sbin'),
    Path('/opt/homebrew/sbin'),
    Path('/usr/local/opt/rabbitmq/sbin'),
)


class BrokerUnavailable(Exception):
    """This machine has no such server. The message says what is missing."""


class BrokerServer(ABC):
    """A broker's server, as a context manager. It keeps its port and, where it is durable, its data
    over restarts.

    Attributes:
        kind: 'redis' or 'rabbitmq'.
        port: The port that clients use.
    """

    kind: str

    def __init__(self) -> None:
        self.home = Path(tempfile.mkdtemp(prefix=f'jobsync-{self.kind}-'))
        self.port = free_port()
        self._owner = os.getpid()
        self._process: subprocess.Popen[bytes] | None = None
        atexit.register(self.close)

    def __enter__(self) -> BrokerServer:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def start(self) -> None:
        """Start the server and wait until it answers; nothing happens if it runs."""
        if self.is_running():
            return
        self._launch()
        deadline = time.monotonic() + _START_SEC
        while not self._answers():
            if not self.is_running() or time.monotonic() > deadline:
                raise RuntimeError(f'{self.kind} did not start on port {self.port}:\n{self.log()}')
            time.sleep(0.02)

    def is_running(self) -> bool:
        """Whether the server's process exists."""
        return self._process is not None and self._process.poll() is None

    def stop(self) -> None:
        """End the server in order."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End the server with SIGKILL."""
        self._end(signal.SIGKILL)

    def restart(self, how: signal.Signals = signal.SIGTERM) -> None:
        """End the server with a signal and start it again on the same port and data."""
        self._end(how)
        self.start()

    def close(self) -> None:
        """End the server and remove its data."""
        if os.getpid() == self._owner:
            atexit.unregister(self.close)
            self.kill()
            shutil.rmtree(self.home, ignore_errors=True)

    def log(self) -> str:
        """The end of the server's output."""
        with contextlib.suppress(OSError):
            return (self.home / 'output').read_text(errors='replace')[-3000:]
        return '(no output)'

    @abstractmethod
    def new_space(self) -> str:
        """Make an empty part of the server, for one test, and return its name."""

    @abstractmethod
    def drop_space(self, space: str) -> None:
        """Remove a part and all that is in it."""

    @abstractmethod
    def url(self, space: str, port: int | None = None) -> str:
        """The URL of a part, as Celery takes it. `port` is that of a proxy in between."""

    @abstractmethod
    def depths(self, space: str) -> dict[str, int]:
        """Messages by place (queue, or where what was delivered and not acknowledged is kept);
        empty places are left out.
        """

    @abstractmethod
    def dead_letters(self, space: str) -> dict[str, int]:
        """Dramatiq's dead letters by queue, without the suffix; empty ones are left out."""

    @abstractmethod
    def _launch(self) -> None:
        """Start the process."""

    @abstractmethod
    def _answers(self) -> bool:
        """Whether clients can use it."""

    def _spawn(
        self, command: list[str], environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        with (self.home / 'output').open('ab') as output:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=self.home,
                env=environment,
                start_new_session=True,
                preexec_fn=die_with_parent(),
            )

    def _end(self, number: signal.Signals) -> None:
        if self._process is not None:
            _end(self._process, number)
            self._process = None


class RedisServer(BrokerServer):
    """A redis-server, or a valkey-server: see redis_program().

    Args:
        durable: Every command is on disk before it is answered, so that a server that was killed
            comes back with all its data.

    Attributes:
        program: The path of the program.

    Raises:
        BrokerUnavailable: There is no redis-server.
    """

    kind = 'redis'

    def __init__(self, durable: bool = False) -> None:
        try:
            self.program = redis_program()
        except EmbeddedServerError as error:
            raise BrokerUnavailable(str(error)) from error
        self._durable = durable
        self._spaces = iter(range(1, 10_000))
        super().__init__()

    def new_space(self) -> str:
        return str(next(self._spaces))

    def drop_space(self, space: str) -> None:
        if self.is_running():
            with contextlib.closing(self.client(space)) as client:
                client.flushdb()

    def url(self, space: str, port: int | None = None) -> str:
        return f'redis://{_HOST}:{port or self.port}/{space}'

    def client(self, space: str = '0') -> Any:
        """A redis-py client."""
        from redis import Redis

        return Redis(
            host=_HOST, port=self.port, db=int(space), decode_responses=True, socket_timeout=5
        )

    def depths(self, space: str) -> dict[str, int]:
        found: dict[str, int] = {}
        with contextlib.closing(self.client(space)) as client:
            for key in client.scan_iter(count=1000):
                # Replies to `inspect` and events are nobody's work.
                if 'pidbox' in key or 'celeryev' in key:
                    continue
                kind = client.type(key)
                if kind == 'list' and not client.exists(
                    f'{key}.msgs'
                ):  # Dramatiq's messages are in a hash, their order in a list
                    found[key] = client.llen(key)
                elif kind == 'hash' and (
                    'unacked' in key or (key.endswith('.msgs') and not key.endswith('.XQ.msgs'))
                ):
                    found[key] = client.hlen(key)
                elif kind == 'set' and '__acks__' in key:
                    found[f'{key} (unacked)'] = client.scard(key)
        return {key: count for key, count in found.items() if count}

    def dead_letters(self, space: str) -> dict[str, int]:
        with contextlib.closing(self.client(space)) as client:
            return {
                key.removesuffix('.XQ.msgs').partition(':')[2]: client.hlen(key)
                for key in client.scan_iter('*.XQ.msgs', count=1000)
            }

    def drop_connections(self) -> int:
        """Close every client's connection; returns how many there were."""
        with contextlib.closing(self.client()) as client:
            return int(client.execute_command('CLIENT', 'KILL', 'TYPE', 'normal', 'SKIPME', 'yes'))

    def _options(self) -> dict[str, object]:
        """Its configuration."""
        return {
            'port': self.port,
            'bind': _HOST,
            'dir': self.home,
            'databases': 10_000,
            'save': '',
            'daemonize': 'no',
            'protected-mode': 'no',
            'appendonly': 'yes' if self._durable else 'no',
            'appendfsync': 'always',
            'loglevel': 'warning',
            'logfile': '',
        }

    def _launch(self) -> None:
        options = self._options().items()
        self._process = self._spawn(
            [self.program, *(part for name, value in options for part in (f'--{name}', str(value)))]
        )

    def _answers(self) -> bool:
        from redis.exceptions import RedisError

        try:
            with contextlib.closing(self.client()) as client:
                return bool(client.ping())
        except RedisError:
            return False


@dataclass(frozen=True)
class RabbitProgram:
    """An installed RabbitMQ.

    Attributes:
        script: What starts it.
        erlang: Where its Erlang is; None: on PATH.
    """

    script: str
    erlang: Path | None = None


class RabbitServer(BrokerServer):
    """A RabbitMQ server with its own epmd.

    Args:
        program: Which one; by default that of the installed rabbitmq-server.
        settings: Lines of its configuration, by name, in addition.
        variables: Values of its Erlang application `rabbit` that have no such line.

    Raises:
        BrokerUnavailable: It is not installed.
    """

    kind = 'rabbitmq'

    def __init__(
        self,
        program: RabbitProgram | None = None,
        settings: Mapping[str, object] | None = None,
        variables: Mapping[str, int] | None = None,
    ) -> None:
        self._program = program or rabbit_program()
        self._variables = {'quorum_tick_interval': _TICK_MSEC, **(variables or {})}
        super().__init__()
        self._management, self._epmd_port, self._dist = free_port(), free_port(), free_port()
        self._epmd: subprocess.Popen[bytes] | None = None
        self._count = 0
        (self.home / 'rabbitmq.conf').write_text(
            '\n'.join(
                [
                    f'listeners.tcp.1 = {_HOST}:{self.port}',
                    f'management.tcp.ip = {_HOST}',
                    f'management.tcp.port = {self._management}',
                    'vm_memory_high_watermark.absolute = 2GB',
                    'disk_free_limit.absolute = 1MB',
                    'log.file.level = warning',
                    *(f'{name} = {value}' for name, value in (settings or {}).items()),
                    '',
                ]
            )
        )
        (self.home / 'enabled_plugins').write_text('[rabbitmq_management].\n')
        (self.home / 'environment').write_text('')

    def new_space(self, default_queue_type: str = '') -> str:
        """As of every server.

        Args:
            default_queue_type: Of the queues whose type nobody says; from version 3.12 on.
        """
        self._count += 1
        space = f'test{self._count}'
        kind = {'default_queue_type': default_queue_type} if default_queue_type else {}
        self.api('PUT', f'vhosts/{space}', kind)
        self.api(
            'PUT', f'permissions/{space}/guest', {'configure': '.*', 'write': '.*', 'read': '.*'}
        )
        return space

    def drop_space(self, space: str) -> None:
        if self.is_running():
            self.api('DELETE', f'vhosts/{space}')

    def url(self, space: str, port: int | None = None) -> str:
        return f'amqp://guest:guest@{_HOST}:{port or self.port}/{space}'

    def depths(self, space: str) -> dict[str, int]:
        queues = self.api('GET', f'queues/{space}?disable_stats=true&enable_queue_totals=true')
        # Nor are dead letters.
        mine = [
            item
            for item in queues
            if 'pidbox' not in item['name']
            and not item['name'].startswith('celeryev')
            and not item['name'].endswith('.XQ')
        ]
        found = {item['name']: item.get('messages_ready', 0) for item in mine}
        found.update(
            {f'{item["name"]} (unacked)': item.get('messages_unacknowledged', 0) for item in mine}
        )
        return {name: count for name, count in found.items() if count}

    def dead_letters(self, space: str) -> dict[str, int]:
        queues = self.api('GET', f'queues/{space}?disable_stats=true&enable_queue_totals=true')
        return {
            item['name'].removesuffix('.XQ'): item['messages_ready']
            for item in queues
            if item['name'].endswith('.XQ') and item.get('messages_ready')
        }

    def queues(self, space: str) -> set[str]:
        """Names of the queues that exist."""
        return {item['name'] for item in self.api('GET', f'queues/{space}?disable_stats=true')}

    def api(self, method: str, path: str, body: object = None) -> Any:
        """Call the management API."""
        credentials = base64.b64encode(b'guest:guest').decode()
        request = urllib.request.Request(
            f'http://{_HOST}:{self._management}/api/{path}',
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={'Authorization': f'Basic {credentials}', 'Content-Type': 'application/json'},
        )
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            error.close()
            raise
        return json.loads(text) if text else None

    def control(self, *words: str) -> str:
        """Run `rabbitmqctl`; what it printed."""
        done = subprocess.run(
            [str(Path(self._program.script).with_name('rabbitmqctl')), *words],
            env=self.environment(),
            cwd=self.home,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
        )
        assert done.returncode == 0, f'rabbitmqctl {" ".join(words)}: {done.stdout} {done.stderr}'
        return done.stdout

    @contextlib.contextmanager
    def memory_alarm(self) -> Iterator[None]:
        """The server is short of memory, by its own measure, and takes no messages; what it has, it
        delivers.
        """
        self.control('set_vm_memory_high_watermark', 'absolute', '1')
        try:
            yield
        finally:
            self.control('set_vm_memory_high_watermark', 'absolute', '2GB')

    def close(self) -> None:
        super().close()
        if os.getpid() == self._owner and self._epmd is not None:
            _end(self._epmd, signal.SIGKILL)
            self._epmd = None

    def environment(self) -> dict[str, str]:
        """What its own command-line tools need."""
        home = self.home
        return {
            'PATH': self._path(),
            'HOME': str(home),
            'LC_ALL': 'C.UTF-8',
            'ERL_EPMD_ADDRESS': _HOST,
            'ERL_EPMD_PORT': str(self._epmd_port),
            'RABBITMQ_DIST_PORT': str(self._dist),
            'RABBITMQ_NODENAME': f'jobsync{self.port}@localhost',
            'RABBITMQ_MNESIA_BASE': str(home / 'mnesia'),
            'RABBITMQ_LOG_BASE': str(home / 'log'),
            'RABBITMQ_PID_FILE': str(home / 'pid'),
            'RABBITMQ_CONFIG_FILE': str(home / 'rabbitmq.conf'),
            'RABBITMQ_CONF_ENV_FILE': str(home / 'environment'),
            'RABBITMQ_ENABLED_PLUGINS_FILE': str(home / 'enabled_plugins'),
            'RABBITMQ_FEATURE_FLAGS_FILE': str(home / 'feature_flags'),
            'RABBITMQ_GENERATED_CONFIG_DIR': str(home / 'generated'),
            # Without it the script would stay as the parent of the server.
            'RUNNING_UNDER_SYSTEMD': 'true',
            # One scheduler that does not spin: the tests' processes need the cores.
            'RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS': (
                '+S 1:1 +sbwt none +sbwtdcpu none +sbwtdio '
                'none -kernel inet_dist_use_interface '
                '{127,0,0,1}'
                + ''.join(f' -rabbit {name} {value}' for name, value in self._variables.items())
            ),
        }

    def _path(self) -> str:
        path = os.environ.get('PATH', os.defpath)
        erlang = self._program.erlang
        return f'{erlang}{os.pathsep}{path}' if erlang is not None else path

    def _launch(self) -> None:
        environment = self.environment()
        if self._epmd is None:
            epmd = shutil.which('epmd', path=self._path())
            if epmd is None:
                raise BrokerUnavailable('no epmd on PATH, which RabbitMQ needs')
            self._epmd = self._spawn(
                [epmd, '-port', str(self._epmd_port), '-address', _HOST], environment
            )
        self._process = self._spawn([self._program.script], environment)

    def _answers(self) -> bool:
        try:
            socket.create_connection((_HOST, self.port), timeout=1).close()
            self.api('GET', 'overview')
        except (OSError, urllib.error.URLError):
            return False
        return True


def free_port() -> int:
    """A port on which nothing listens."""
    for port in random.SystemRandom().sample(_PORTS, 100):
        with socket.socket() as probe:
            with contextlib.suppress(OSError):
                probe.bind((_HOST, port))
                return port
    raise RuntimeError(f'no free port in 100 tries from {_PORTS.start} to {_PORTS.stop}')


def die_with_parent() -> Callable[[], None] | None:
    """What subprocess runs before it starts a program, so that Linux kills the program when this
    process is gone.
    """
    if not sys.platform.startswith('linux'):
        return None
    # Looked up here: a child of a process with threads must do as little as possible before its
    # program starts.
    prctl = ctypes.CDLL(None).prctl
    owner = os.getpid()

    def arrange() -> None:
        prctl(1, int(signal.SIGKILL))
        if os.getppid() != owner:
            os._exit(1)

    return arrange


def _end(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """Send a signal and wait; what does not end in time, or is left of its group, is killed."""
    if process.poll() is None:
        process.send_signal(signal.SIGCONT)
        process.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_SEC)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def rabbit_program() -> RabbitProgram:
    """The installed RabbitMQ.

    Raises:
        BrokerUnavailable: There is none.
    """
    # Debian's wrapper on PATH wants to be root or its own user; the script behind it runs as
    # anybody.
    beside = shutil.which('rabbitmq-server')
    places = [*_RABBIT_SCRIPTS, *([Path(beside).resolve().parent] if beside else [])]
    for place in places:
        if (place / 'rabbitmq-server').exists() and (place / 'rabbitmq-env').exists():
            return RabbitProgram(str(place / 'rabbitmq-server'))
    raise BrokerUnavailable('rabbitmq-server is not installed')
