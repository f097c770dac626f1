"""What a node costs while nothing happens: counted on the wire and in the process, never timed."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest

from jobsync_core import CoordinationConfig, Job
from tests.support.cluster import query
from tests.support.proxy import Proxy
from tests.support.waiting import eventually

MakeConfig = Callable[..., CoordinationConfig]

_STARTUP = 196_608
#: Heartbeats of the window. With the default settings' ratio of intervals it stands for one minute.
_BEATS = 12


class Tap:
    """Reads what one node says to PostgreSQL: the statements, and the number of bytes each way."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._unread: dict[int, bytes] = {}
        self._started: set[int] = set()
        self.statements: list[str] = []
        self.sent = 0
        self.received = 0

    def __call__(self, link: int, to_server: bool, data: bytes) -> None:
        with self._lock:
            if to_server:
                self.sent += len(data)
                self._unread[link] = self._parse(link, self._unread.get(link, b'') + data)
            else:
                self.received += len(data)

    def _parse(self, link: int, data: bytes) -> bytes:
        while True:
            typed = link in self._started
            header = 5 if typed else 4
            if len(data) < header:
                return data
            length = int.from_bytes(data[header - 4 : header], 'big') + header - 4
            if len(data) < length:
                return data
            message, data = data[:length], data[length:]
            if not typed:
                if int.from_bytes(message[4:8], 'big') == _STARTUP:
                    self._started.add(link)
            elif message[:1] == b'Q':
                self.statements.append(message[5:-1].decode())
            else:
                assert message[:1] in b'pX', (
                    f'the extended protocol is not counted here: {message[:1]!r}'
                )


@dataclass(frozen=True)
class Cost:
    """What a node said in a window of heartbeats."""

    beats: int
    statements: list[str]
    sent: int
    received: int


@contextlib.contextmanager
def watched_follower(config: CoordinationConfig) -> Iterator[tuple[Tap, Proxy]]:
    """Four nodes, of which the youngest, neither leader nor successor, is listened to."""
    tap = Tap()
    with contextlib.ExitStack() as stack:
        for name in ('n1', 'n2', 'n3'):
            stack.enter_context(Job(name, config, wait_on_enter=0))
        proxy = stack.enter_context(Proxy(config.host, int(config.port), tap))
        job = stack.enter_context(
            Job('n4', replace(config, host=proxy.host, port=proxy.port), wait_on_enter=0)
        )
        eventually(lambda: len(job.my_tokens) == config.total_tokens // 4)
        quiet = _beat(config)
        eventually(lambda: _beat(config) >= quiet + 3)
        yield tap, proxy


def _beat(config: CoordinationConfig) -> int:
    ((beat,),) = query(config, """SELECT beat FROM "{}node" WHERE name = 'n4'""")
    return int(beat)


def measure(config: CoordinationConfig, tap: Tap) -> Cost:
    """Listen for a window of heartbeats."""
    first = _beat(config)
    eventually(lambda: _beat(config) > first)
    first, statements, sent, received = _beat(config), len(tap.statements), tap.sent, tap.received
    eventually(lambda: _beat(config) >= first + _BEATS, timeout=30)
    return Cost(
        _beat(config) - first, tap.statements[statements:], tap.sent - sent, tap.received - received
    )


@pytest.fixture
def slow(make_config: MakeConfig) -> CoordinationConfig:
    """The default settings, 15 times faster."""
    return make_config(
        heartbeat_interval_sec=1 / 3, heartbeat_timeout_sec=1, rebalance_check_interval_sec=2
    )


def test_a_steady_follower_sends_one_statement_per_heartbeat_and_no_transaction_around_it(
    slow: CoordinationConfig,
) -> None:
    with watched_follower(slow) as (tap, _):
        cost = measure(slow, tap)
    assert len(cost.statements) <= cost.beats + 1, cost.statements
    words = {statement.split()[0].upper().rstrip(';') for statement in cost.statements}
    assert not words & {'BEGIN', 'COMMIT', 'ROLLBACK', 'START', 'SET'}, words


def test_a_steady_follower_has_one_connection_and_one_thread(slow: CoordinationConfig) -> None:
    with watched_follower(slow) as (_, proxy):
        assert proxy.connections == 1
        assert [thread.name for thread in threading.enumerate() if thread.name.endswith('n4')] == [
            'jobsync-n4'
        ]
        assert not [
            thread for thread in threading.enumerate() if thread.name == 'jobsync-callbacks'
        ]


def test_bytes_of_a_steady_follower_do_not_depend_on_the_number_of_tokens(
    make_config: MakeConfig,
) -> None:
    per_beat = []
    for tokens in (1_000, 1_000_000):
        config = make_config(
            appname=f'cost{tokens}_',
            total_tokens=tokens,
            heartbeat_interval_sec=1 / 3,
            heartbeat_timeout_sec=1,
            rebalance_check_interval_sec=2,
        )
        with watched_follower(config) as (tap, _):
            cost = measure(config, tap)
        per_beat.append((cost.sent + cost.received) / cost.beats)
    few, many = per_beat
    assert many < 1.25 * few
    assert many < 4_000


def test_nothing_is_written_to_the_assignment_while_nothing_changes(
    slow: CoordinationConfig,
) -> None:
    rows = 'SELECT xmin::text, tokens::text, node, version FROM "{}assignment" ORDER BY tokens'
    with watched_follower(slow) as (tap, _):
        before = query(slow, rows), query(slow, 'SELECT count(*) FROM "{}rebalance"')
        measure(slow, tap)
        assert (query(slow, rows), query(slow, 'SELECT count(*) FROM "{}rebalance"')) == before


def test_importing_the_core_loads_psycopg2_and_the_standard_library_alone() -> None:
    program = (
        'import sys; before = set(sys.modules); import jobsync_core; '
        'print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before} - '
        'set(sys.stdlib_module_names)))'
    )
    output = subprocess.run(
        [sys.executable, '-c', program], check=True, capture_output=True, text=True
    ).stdout.split()
    assert [name for name in output if name not in ('jobsync_core', 'psycopg2')] == []
