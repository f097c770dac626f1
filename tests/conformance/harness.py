"""A cluster of real worker processes of some framework, on some broker: what the scenarios are
written against.

A scenario knows the `Cluster` alone. What differs between frameworks stands behind `Adapter`; what
differs between brokers behind `BrokerServer`.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar

from jobsync_core import CoordinationConfig
from jobsync_core.embedded.supervisor import running, server_processes
from tests.support.brokers import BrokerServer, die_with_parent
from tests.support.cluster import query
from tests.support.waiting import eventually

from .history import EFFECTS, Ledger, Note, Notes, Sent, check
from .work import Order

__all__ = ['QUICK', 'STEADY', 'Adapter', 'Cluster', 'Outcome', 'Place', 'Worker']

_ROOT = Path(__file__).parents[2]
_START_SEC = 40.0
# A pool process of Celery's that ends waits up to 30 s for the parent to count its last result,
# which a warm shutdown may have dropped.
_STOP_SEC = 60.0
#: JobSync's settings where a death is to be noticed soon, and where a busy machine must not look
#: like one.
QUICK = {
    'heartbeat_interval_sec': 0.3,
    'heartbeat_timeout_sec': 1.5,
    'rebalance_check_interval_sec': 1,
    'total_tokens': 1000,
    # tests that kill at random may kill the same key often
    'max_lost': 50,
}
STEADY = {**QUICK, 'heartbeat_interval_sec': 0.5, 'heartbeat_timeout_sec': 5}
#: Lines of a worker's log that tell nothing.
_DULL = re.compile(
    r'\] received$|succeeded in \d|^ *-- |^---|^- \*\*|^  \. |^$|superuser|not '
    r'recommended|--uid|User information|_warn_or'
)


@dataclass(frozen=True)
class Place:
    """Where a test's cluster lives.

    Attributes:
        server: The broker.
        space: The test's part of it.
        results: URL of the result backend.
        config: The test's database.
        directory: For logs and notes.
        conf: The framework's settings, of workers and senders alike.
    """

    server: BrokerServer
    space: str
    results: str
    config: CoordinationConfig
    directory: Path
    conf: Mapping[str, Any] = field(default_factory=dict)

    def order(self, jobsync: bool, settings: dict[str, Any], pins: Sequence[str] = ()) -> Order:
        """What a process of this place is told."""
        config = self.config
        return Order(
            broker=self.server.url(self.space),
            results=self.results,
            notes=str(self.directory / 'notes'),
            jobsync=jobsync,
            database=f'postgresql://{config.user}:{config.password}@{config.host}:{config.port}/{config.dbname}',
            settings=settings,
            pins=list(pins),
            conf=dict(self.conf),
        )


@dataclass(frozen=True)
class Outcome:
    """What the sender learns.

    Attributes:
        state: 'done', 'failed', 'revoked', or 'pending'.
        value: The result, or the exception.
    """

    state: str
    value: Any = None


class Worker:
    """A worker process.

    Args:
        name: The worker's name.
        nodes: How many nodes it is.
        command: How to start it.
        order: What it is told.
        log: Where its output goes.
        ready: What each of its nodes prints when it is ready.
        environment: Further environment variables.
    """

    def __init__(
        self,
        name: str,
        nodes: int,
        command: Sequence[str],
        order: Order,
        log: Path,
        ready: str,
        environment: Mapping[str, str],
    ) -> None:
        self.name = name
        self.nodes = nodes
        self._log = log
        self._ready = ready
        inherited = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(('JOBSYNC_', 'CELERY_', 'PYTEST_'))
        }
        with log.open('w') as output:
            self.process = subprocess.Popen(
                list(command),
                cwd=_ROOT,
                env={**inherited, **environment, **order.environment(), 'PYTHONUNBUFFERED': '1'},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=die_with_parent(),
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def children(self) -> list[int]:
        """Processes of the worker's pool; from Python 3.14 on, Dramatiq's are children of a fork
        server, which has a tracker beside it.
        """
        found = (server_processes(child)[1:] or [child] for child in server_processes(self.pid)[1:])
        return [pid for pids in found for pid in pids if 'resource_tracker' not in _command_of(pid)]

    def is_running(self) -> bool:
        return self.process.poll() is None

    def log(self, end: int = 0) -> str:
        """Its output, or the last characters of it."""
        return self._log.read_text(errors='replace')[-end:]

    def wait_ready(self, timeout: float = _START_SEC) -> Worker:
        """Wait until it consumes."""
        eventually(lambda: self.is_ready() or not self.is_running(), timeout)
        assert self.is_ready(), (
            f'{self.name} ended with {self.process.returncode}:\n{self.log(3000)}'
        )
        return self

    def is_ready(self) -> bool:
        """Whether it has said that it consumes."""
        return self.log().count(self._ready) >= self.nodes

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal to its main process."""
        self.process.send_signal(number)

    def pause(self) -> None:
        """SIGSTOP to all of its processes."""
        for pid in [self.pid, *self.children]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT to all of its processes."""
        for pid in [*self.children, self.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL to its main process; its pool ends by itself, or is orphaned."""
        self.process.kill()
        self.process.wait()

    def crash(self) -> None:
        """SIGKILL to all of its processes, as when their machine dies."""
        self.process.kill()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.process.wait()

    def stop(self, number: signal.Signals = signal.SIGTERM, timeout: float = _STOP_SEC) -> int:
        """Send a signal that ends it, and return its exit code."""
        self.send_signal(number)
        return self.wait(timeout)

    def wait(self, timeout: float = _STOP_SEC) -> int:
        """Its exit code, once it has ended."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            size = len(self.log())
            self.send_signal(signal.SIGUSR2)
            with contextlib.suppress(AssertionError):
                eventually(lambda: len(self.log()) > size, 5)
            raise AssertionError(
                f'{self.name} did not end within {timeout} s:\n{self.log(6000)}'
            ) from None

    def close(self) -> None:
        """End it and all of its processes, whatever their state."""
        children = self.children
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.process.wait()
        eventually(lambda: not any(running(pid) for pid in children))


def _command_of(pid: int) -> str:
    try:
        return Path(f'/proc/{pid}/cmdline').read_text(errors='replace')
    except OSError:  # it is gone, or there is no /proc
        return ''


class Adapter(ABC):
    """What a framework does its own way.

    Args:
        place: Where the cluster lives.
        jobsync: False leaves JobSync out: so the harness is proved on the framework alone.
        settings: JobSync's settings.
        pins: Pinned tasks that the cluster has.
    """

    framework: str
    #: Pools that workers can have, by kind: 'processes', 'threads' and 'single' (one task at a
    #: time).
    pools: ClassVar[Mapping[str, str]]
    #: A process of the pool that dies is replaced, and the worker goes on; otherwise the worker
    #: ends.
    replaces_processes: ClassVar[bool]
    #: Options of `Cluster.launch` with which a worker takes no message before it can run it.
    one_at_a_time: ClassVar[Mapping[str, Any]]

    def __init__(
        self, place: Place, jobsync: bool, settings: dict[str, Any], pins: Sequence[str] = ()
    ) -> None:
        self.place = place
        self.jobsync = jobsync
        self.order = place.order(jobsync, settings, pins)

    @abstractmethod
    def node_of(self, name: str) -> str:
        """The name that a worker is told to give its node, or to begin the names of its nodes
        with.
        """

    @abstractmethod
    def worker_of(self, node: str) -> str:
        """The name of a node's worker."""

    @abstractmethod
    def nodes(self, pool: str) -> int:
        """How many nodes a worker with such a pool is."""

    @abstractmethod
    def command(self, name: str, pool: str, concurrency: int, options: Sequence[str]) -> list[str]:
        """How to start a worker."""

    @abstractmethod
    def ready(self, name: str) -> str:
        """What each node of a worker prints when it is ready."""

    @abstractmethod
    def send(
        self, task: str, args: Sequence[Any] = (), *, routed: bool = False, **options: Any
    ) -> str:
        """Send a message, and return its id.

        Args:
            task: The task's name.
            args: Its arguments.
            routed: The sender's JobSync routes it; otherwise it goes to its home queue, as from a
                sender that has none.
            options: The framework's; `delay` in seconds is common to all.
        """

    @abstractmethod
    def send_steps(self, tag: str, numbers: Sequence[int], *, routed: bool = False) -> str:
        """Send `add` as steps of which each adds a number to the one before, from 0; the id of the
        message that has the sum.
        """

    @abstractmethod
    def send_group(self, tag: str, numbers: Sequence[int], *, routed: bool = False) -> None:
        """Send `add(number, number)` for each number, and `seal` for when all are done."""

    @abstractmethod
    def outcome(self, message: str) -> Outcome:
        """What the sender knows about a message by now."""

    @abstractmethod
    def close(self) -> None:
        """Give back the sender's connections."""


class Cluster:
    """Workers that share a broker and a database. Leaving the `with` block ends them all.

    Args:
        adapter: The framework.
        pool: Kind of pool, unless a worker is told otherwise.
    """

    #: Clusters that have not ended: a failure shows their logs.
    alive: ClassVar[list[Cluster]] = []

    def __init__(self, adapter: Adapter, pool: str) -> None:
        self.adapter = adapter
        self.place = adapter.place
        self.pool = pool
        self.notes = Notes(Path(adapter.order.notes))
        self.ledger = Ledger(self.place.config)
        self.sent: list[Sent] = []
        self.workers: dict[str, Worker] = {}
        self._started: list[Worker] = []
        query(self.place.config, EFFECTS)

    def __enter__(self) -> Cluster:
        self.alive.append(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __getitem__(self, name: str) -> Worker:
        return self.workers[name]

    def close(self) -> None:
        """End all workers."""
        if self in self.alive:
            self.alive.remove(self)
            for worker in self._started:
                worker.close()
            self.adapter.close()

    def report(self) -> str:
        """What helps to understand a failure."""
        parts = []
        for title, find in (
            ('left at the broker', self.left),
            ('tokens', self.ledger.owned),
            ('running', self.unfinished),
        ):
            with contextlib.suppress(Exception):
                parts.append(f'{title}: {find()}')
        for worker in self._started:
            log = '\n'.join(line for line in worker.log().splitlines() if not _DULL.search(line))
            parts.append(
                f'=== {worker.name} (pid {worker.pid}, exit code '
                f'{worker.process.returncode})\n{log[-12_000:]}'
            )
        return '\n'.join(parts)

    def launch(
        self,
        name: str,
        *,
        pool: str | None = None,
        concurrency: int = 2,
        options: Sequence[str] = (),
        broker: str | None = None,
        database: str | None = None,
        results: str | None = None,
        conf: dict[str, Any] | None = None,
        without: Iterable[str] = (),
        environment: Mapping[str, str] | None = None,
        loose: Iterable[str] = (),
        pause: float = 0.0,
        torn: int = 0,
        **settings: Any,
    ) -> Worker:
        """Start a worker; it is not waited for.

        Args:
            name: Its name.
            pool: Kind of pool.
            concurrency: Tasks that it runs at once.
            options: Further words of its command line.
            broker, database: URLs by which it reaches them, if not directly.
            results: Another result backend.
            conf: The framework's settings.
            without: Tasks that it does not know.
            environment: Further environment variables.
            loose: Pinned tasks that are not pinned on it, and have no affinity.
            pause: Seconds that every task takes longer on it.
            torn: The task during whose writing into a pipe it gets SIGQUIT.
            settings: JobSync's settings.
        """
        order = replace(
            self.adapter.order,
            node=self.adapter.node_of(name),
            without=list(without),
            loose=list(loose),
            conf={**self.adapter.order.conf, **(conf or {})},
            pause=pause,
            torn=torn,
            settings={**self.adapter.order.settings, **settings},
        )
        if broker is not None:
            order = replace(order, broker=broker)
        if database is not None:
            order = replace(order, database=database)
        if results is not None:
            order = replace(order, results=results)
        log = self.place.directory / f'{name}-{len(self._started)}.log'
        command = self.adapter.command(name, pool or self.pool, concurrency, options)
        worker = Worker(
            name,
            self.adapter.nodes(pool or self.pool),
            command,
            order,
            log,
            self.adapter.ready(name),
            environment or {},
        )
        self._started.append(worker)
        self.workers[name] = worker
        return worker

    def start(self, *names: str, settle: bool = True, **options: Any) -> None:
        """Start workers at once; wait until all are ready and own their shares."""
        started = [self.launch(name, **options) for name in names]
        for worker in started:
            worker.wait_ready()
        if settle:
            self.settle()

    def settle(self, timeout: float = 30.0) -> None:
        """Wait until exactly the workers that run own all tokens, but those that a pin blocks."""
        if not self.adapter.jobsync:
            return
        nodes = {
            worker.name: worker.nodes for worker in self.workers.values() if worker.is_running()
        }
        total = self.place.config.total_tokens

        def settled() -> bool:
            owned = self.ledger.owned()
            return (
                Counter(map(self.worker_of, owned)) == nodes
                and sum(owned.values()) + self.ledger.blocked() == total
            )

        eventually(settled, timeout)

    def worker_of(self, node: str | None) -> str | None:
        """The name of a node's worker."""
        return self.adapter.worker_of(node) if node else None

    def owning(self) -> set[str | None]:
        """Names of the workers that own tokens."""
        return {self.worker_of(node) for node in self.ledger.owned()}

    def lives(self, name: str) -> set[str]:
        """Incarnations of a worker's nodes: others mean that they were evicted, or started anew."""
        return {
            life
            for node, life in self.ledger.incarnations().items()
            if self.worker_of(node) == name
        }

    def ran_on(self, *letters: str, least: int = 0) -> set[str | None]:
        """Names of the workers on which tasks ended whose keys have certain letters, if any are
        given, and a number of at least `least`.
        """
        return {
            self.worker_of(note.node)
            for note in self.notes.of('end')
            if (not letters or note.key[0] in letters) and int(note.key.partition(':')[2]) >= least
        }

    def send(self, task: str, n: int, *args: Any, fate: str = 'done', **options: Any) -> str:
        """Send a message of one of the tasks that take a number first, and remember it."""
        message = self.adapter.send(task, (n, *args), **options)
        self.sent.append(Sent(message, f'{_LETTERS[task]}:{n}', fate))
        return message

    def numbers(self, name: str, count: int, start: int = 0, task: str = 'keyed') -> list[int]:
        """Numbers from `start` whose keys a worker owns now."""
        letter = _LETTERS[task]
        owners = self.ledger.owners(f'{letter}:{n}' for n in range(start, start + 100 * count))
        found = [int(key[2:]) for key, owner in owners.items() if self.worker_of(owner) == name][
            :count
        ]
        assert len(found) == count, f'{name} owns too little: {self.ledger.owned()}'
        return found

    def expect(self, key: str, message: str = '', fate: str = 'done') -> None:
        """Remember a message that was sent another way."""
        self.sent.append(Sent(message, key, fate))

    def outcome(self, message: str, timeout: float = 30.0) -> Outcome:
        """What becomes of a message; waits until that is known."""

        def find() -> Outcome | None:
            found = self.adapter.outcome(message)
            return None if found.state == 'pending' else found

        try:
            found = eventually(find, timeout)
        except AssertionError:
            sent = next((item for item in self.sent if item.id == message), None)
            last = self.adapter.outcome(message)
            raise AssertionError(
                f'message {message} has no outcome after {timeout} s, but {last}: {sent}'
            ) from None
        assert found is not None
        return found

    def result(self, message: str, timeout: float = 30.0) -> Any:
        """A message's result."""
        found = self.outcome(message, timeout)
        assert found.state == 'done', f'message {message}: {found}'
        return found.value

    def ended(self, *keys: str) -> list[Note]:
        """Notes of the ends of tasks."""
        return self.notes.of('end', keys or None)

    def wait_ended(self, keys: Iterable[str], timeout: float = 30.0) -> list[Note]:
        """Wait until each key has run to its end at least once; the notes of that."""
        wanted = set(keys)

        def missing() -> set[str]:
            return wanted - {note.key for note in self.notes.of('end', wanted)}

        with contextlib.suppress(AssertionError):
            eventually(lambda: not missing() or not self._alive(), timeout)
        lost = missing()
        messages = [(item.key, item.id) for item in self.sent if item.key in lost]
        assert not lost, (
            f'{len(lost)} of {len(wanted)} did not run to their end within {timeout} s: '
            f'{messages[:10]}'
        )
        return self.notes.of('end', wanted)

    def wait_started(self, keys: Iterable[str], timeout: float = 30.0) -> None:
        """Wait until each key has been begun."""
        wanted = set(keys)
        eventually(lambda: wanted <= {note.key for note in self.notes.of('start', wanted)}, timeout)

    def wait_progress(self, count: int, timeout: float = 40.0) -> None:
        """Wait until tasks have ended this many times."""
        eventually(lambda: len(self.notes.of('end')) >= count or not self._alive(), timeout)

    def _alive(self) -> bool:
        return any(worker.is_running() for worker in self.workers.values())

    def left(self) -> dict[str, int]:
        """Messages at the broker, by place."""
        return self.place.server.depths(self.place.space)

    def unfinished(self) -> dict[str, str]:
        """Keys that the ledger has as begun and not completed."""
        return {key: state for key, state in self.ledger.states().items() if state == 'running'}

    def finish(self, timeout: float = 40.0) -> None:
        """Wait until all that was sent has happened and nothing is left anywhere; then check the
        history.
        """
        self.wait_ended({item.key for item in self.sent if item.fate == 'done'}, timeout)
        if self._alive():
            eventually(lambda: not self.left(), timeout)
        if self.adapter.jobsync:
            eventually(lambda: not self.unfinished(), timeout)
        print(check(self.sent, self.notes, self.ledger, self.adapter.jobsync))

    def stable(self) -> _Stable:
        """A block during which no node was evicted; after it, `check_owners` says who ran what."""
        return _Stable(self)


class _Stable:
    """Checks that tasks ran on their owners, unless ownership moved in the meantime."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._before = cluster.ledger.incarnations()

    def check_owners(self, letters: str = 'kbfir', least: int = 1) -> None:
        """Every key ran on the node that owns it, if no node came or went since the block began."""
        ledger = self._cluster.ledger
        if not self._cluster.adapter.jobsync:
            return
        if ledger.incarnations() != self._before:
            print('a node was evicted meanwhile: owners are not compared')
            return
        ends = [note for note in self._cluster.notes.of('end') if note.key[0] in letters]
        assert len(ends) >= least
        routes = {note: (note.message if note.key.startswith('i:') else note.key) for note in ends}
        owners = ledger.owners(set(routes.values()))
        wrong = {
            note.key: (note.node, owners[route])
            for note, route in routes.items()
            if owners[route] != note.node
        }
        assert not wrong, (
            f'{len(wrong)} of {len(ends)} ran elsewhere than on their owner: '
            f'{dict(list(wrong.items())[:10])}'
        )


_LETTERS = {
    'keyed': 'k',
    'body': 'b',
    'limited': 'b',
    'by_id': 'i',
    'plain': 'p',
    'routed': 'r',
    'pinned': 'g',
    'preferred': 'g',
    'homeless': 'g',
    'late': 't',
    'loose': 'l',
    'hasty': 'h',
    'flaky': 'f',
    'retrying': 'f',
    'sour': 's',
    'poison': 'x',
    'overdue': 'o',
    'overdue_softly': 'o',
    'patient': 'b',
    'awaited': 'w',
    'classy': 'b',
}


def within(seconds: float, condition: Callable[[], object], every: float = 0.005) -> None:
    """`eventually`, looked at often: for times that are printed."""
    eventually(condition, seconds, every)
