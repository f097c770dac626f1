"""Starts nodes as processes of their own, each behind its own proxy, and breaks them."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import psycopg2
import psycopg2.extensions

from jobsync_core import CoordinationConfig, Job
from jobsync_core.node.cluster import ClusterNode
from tests.support.history import History, moment
from tests.support.proxy import Proxy
from tests.support.waiting import eventually

__all__ = ['SAMPLE', 'Cluster', 'Node', 'node_of', 'query']

#: The tasks that every node is asked about.
SAMPLE = tuple(range(60))
_ROOT = Path(__file__).parents[2]
_START_SEC = 60.0
_SETTLE_SEC = 60.0


def query(
    config: CoordinationConfig, sql: str, params: tuple[object, ...] = ()
) -> list[tuple[Any, ...]]:
    """Run a statement on a connection that no proxy disturbs. `{}` in it stands for the table
    prefix.
    """
    # Kept, because conditions are polled: to connect takes the server and us several milliseconds
    # each.
    where = os.getpid(), threading.get_ident(), config.host, config.port, config.dbname, config.user
    connection = _kept.pop(where, None)
    if connection is None or not _is_good(connection):
        connection = psycopg2.connect(
            host=config.host,
            port=config.port,
            dbname=config.dbname,
            user=config.user,
            password=config.password,
            connect_timeout=5,
        )
        connection.autocommit = True
    with connection.cursor() as cursor:
        cursor.execute(sql.replace('{}', config.appname), params)
        found = cursor.fetchall() if cursor.description else []
    _kept[where] = connection
    while len(_kept) > _MOST_KEPT:
        _kept.pop(next(iter(_kept))).close()
    return found


def node_of(job: Job) -> ClusterNode:
    """What stands behind a Job of a cluster."""
    node = job._node
    assert isinstance(node, ClusterNode)
    return node


#: The latest connections of `query`, by process, thread, and where they go to.
_kept: dict[tuple[object, ...], psycopg2.extensions.connection] = {}
_MOST_KEPT = 3


def _is_good(connection: psycopg2.extensions.connection) -> bool:
    """Whether the server has not ended an idle connection: then there would be something to
    read.
    """
    if connection.closed:
        return False
    waiting = select.poll()
    waiting.register(connection.fileno(), select.POLLIN)
    return not waiting.poll(0)


class Node:
    """One process.

    Args:
        label: Name of the process in histories; differs from `name` where two processes share a
            node name.
        name: The node's name.
        config: How to reach the server; the proxy comes in between.
        directory: Where record and log go.
        options: Further settings of node_process.
    """

    def __init__(
        self, label: str, name: str, config: CoordinationConfig, directory: Path, **options: Any
    ) -> None:
        self.label = label
        self.name = name
        self.record = directory / f'{label}.record'
        self.log = directory / f'{label}.log'
        self.proxy = Proxy(config.host, int(config.port))
        self.events: list[dict[str, Any]] = []
        fields = {item.name: getattr(config, item.name) for item in dataclasses.fields(config)}
        fields.update(
            host=self.proxy.host,
            port=self.proxy.port,
            connection_options=dict(config.connection_options),
        )
        job = {'wait_on_enter': 0, **options.pop('job', {})}
        settings = {
            'name': name,
            'config': fields,
            'record': str(self.record),
            'log': str(self.log),
            'tasks': SAMPLE,
            'job': job,
            **options,
        }
        with self.log.with_suffix('.stderr').open('w') as errors:
            self.process = subprocess.Popen(
                [sys.executable, '-m', 'tests.support.node_process'],
                cwd=_ROOT,
                text=True,
                bufsize=1,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
            )
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._write(json.dumps(settings))

    @property
    def pid(self) -> int:
        return self.process.pid

    def send(self, command: str) -> None:
        """Give the process a command."""
        self._write(command)

    def wait_event(
        self, kind: str, timeout: float = _START_SEC, after: float = 0.0
    ) -> dict[str, Any]:
        """The first event of a kind that happened after a moment; waits for it."""

        def find() -> dict[str, Any] | None:
            return next(
                (event for event in self.events if event['event'] == kind and event['at'] > after),
                None,
            )

        with self._changed:
            self._changed.wait_for(
                lambda: (
                    find() is not None
                    or (self.process.poll() is not None and not self._reader.is_alive())
                ),
                timeout,
            )
            found = find()
        assert found is not None, (
            f'node {self.label}: no event {kind!r}; had {self.events}\n{self.report()}'
        )
        return found

    def command(self, command: str, answer: str) -> dict[str, Any]:
        """Give a command and wait for its answer."""
        since = moment()
        self.send(command)
        return self.wait_event(answer, after=since)

    def kill(self) -> float:
        """SIGKILL; when the process is gone, return the moment before."""
        since = moment()
        self.process.kill()
        self.process.wait()
        return since

    def stop(self) -> None:
        """SIGSTOP."""
        os.kill(self.pid, signal.SIGSTOP)

    def cont(self) -> float:
        """SIGCONT; the moment before."""
        since = moment()
        os.kill(self.pid, signal.SIGCONT)
        return since

    def leave(self, timeout: float = 30) -> float:
        """Leave the cluster in order; the moment before."""
        since = moment()
        self.send('leave')
        assert self.process.wait(timeout) == 0, self.report()
        return since

    def report(self) -> str:
        """The end of the process's log, for messages."""
        parts = []
        for path in (self.log, self.log.with_suffix('.stderr'), Path(f'{self.log}.crash')):
            if path.exists() and path.stat().st_size:
                parts.append(f'--- {path.name}\n{path.read_text()[-3000:]}')
        return '\n'.join(parts)

    def close(self) -> None:
        """End the process, whatever its state, and its proxy."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._reader.join(10)
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            with contextlib.suppress(OSError):
                stream.close()
        self.proxy.close()

    def _write(self, line: str) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(line + '\n')
            self.process.stdin.flush()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._changed:
                if line.endswith('\n'):
                    self.events.append(json.loads(line))
                self._changed.notify_all()
        with self._changed:
            self._changed.notify_all()


class Cluster:
    """Nodes that share one database. Leaving the `with` block kills what still runs and checks that
    nothing overlapped.

    Args:
        config: How to reach the server itself.
        directory: Where records and logs go.
        checked: False where overlaps are what the test is after.
    """

    def __init__(self, config: CoordinationConfig, directory: Path, checked: bool = True) -> None:
        self.config = config
        self.directory = directory
        self._checked = checked
        self.nodes: dict[str, Node] = {}
        self._started: list[Node] = []

    def __enter__(self) -> Cluster:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for node in self._started:
            node.close()
        overlaps = self.history().overlaps()
        if error is not None:
            for node in self._started:
                print(f'=== {node.label}: {node.events}\n{node.report()}')
        assert not (overlaps and self._checked), (
            f'{len(overlaps)} overlaps, the longest {max(item.seconds for item in overlaps):.3f} '
            f's: {overlaps[:5]}'
        )

    def __getitem__(self, label: str) -> Node:
        return self.nodes[label]

    def launch(
        self,
        label: str,
        name: str | None = None,
        config: CoordinationConfig | None = None,
        **options: Any,
    ) -> Node:
        """Start a process; it is not waited for."""
        unique = f'{label}-{sum(node.label.split("-")[0] == label for node in self._started)}'
        node = Node(unique, name or label, config or self.config, self.directory, **options)
        self._started.append(node)
        self.nodes[label] = node
        return node

    def start(self, *labels: str, settle: bool = True, **options: Any) -> float:
        """Start processes at once and wait until all have entered and each owns its share; the
        moment before.
        """
        since = moment()
        for node in [self.launch(label, **options) for label in labels]:
            node.wait_event('entered')
        if settle:
            self.wait_balanced()
            self.wait_claimed()
        return since

    def history(self) -> History:
        """What all processes, dead or alive, have answered so far."""
        return History({node.label: node.record for node in self._started}, SAMPLE)

    def wait_claimed(self, since: float | None = None, timeout: float = _SETTLE_SEC) -> float:
        """Wait until each task of the sample has been claimed by an answer later than `since`
        (default now); the longest gap in seconds.
        """
        start = moment() if since is None else since
        eventually(lambda: not self.history().unclaimed_since(start), timeout=timeout)
        return self.history().longest_gap(start)

    def wait_claims_of(self, label: str, since: float, timeout: float = _SETTLE_SEC) -> float:
        """Wait until a node claims something by an answer later than `since`; the moment when that
        was seen.
        """
        node = self.nodes[label]
        eventually(lambda: self.history().claimed_by(node.label, since), timeout=timeout)
        return moment()

    def assignment(self) -> list[tuple[Any, ...]]:
        """Who owns which tokens, as the database has it."""
        return query(
            self.config, 'SELECT lower(tokens), upper(tokens), node FROM "{}assignment" ORDER BY 1'
        )

    def owned(self) -> dict[str, int]:
        """Number of tokens by node; tokens that are owned by nobody count under ''."""
        owned: dict[str, int] = {}
        for low, high, node in self.assignment():
            owned[node or ''] = owned.get(node or '', 0) + high - low
        return owned

    def members(self) -> list[str]:
        """Names in the node table, the eldest first."""
        return [
            name
            for (name,) in query(self.config, 'SELECT name FROM "{}node" ORDER BY created_on, name')
        ]

    def evictions(self) -> list[tuple[Any, ...]]:
        """The incarnation of each member: it changes when a node has been evicted."""
        return query(self.config, 'SELECT name, incarnation FROM "{}node" ORDER BY name')

    def wait_balanced(
        self, names: Iterable[str] | None = None, timeout: float = _SETTLE_SEC
    ) -> None:
        """Wait until exactly these nodes (default: all whose processes run) own all tokens, each
        its share.
        """
        expected = (
            set(names)
            if names is not None
            else {node.name for node in self.nodes.values() if node.process.poll() is None}
        )
        low = self.config.total_tokens // len(expected)

        def balanced() -> bool:
            owned = self.owned()
            return (
                set(owned) == expected
                and sum(owned.values()) == self.config.total_tokens
                and all(low <= count <= low + 1 for count in owned.values())
            )

        eventually(balanced, timeout=timeout)
