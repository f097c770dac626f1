"""Nodes under measurement: child processes that obey commands, and clusters of them on a fresh
database.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import queue
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psycopg2
from psycopg2 import sql

from jobsync_core import CoordinationConfig

from .peer import Side

__all__ = ['FAST', 'ChildFailed', 'Cluster', 'Databases', 'Node']

#: Intervals that let a cluster change quickly, where the time of the change is not what is
#: measured. Each side takes the ones it knows.
FAST: Mapping[str, Any] = {
    'heartbeat_interval_sec': 1,
    'heartbeat_timeout_sec': 8,
    'rebalance_check_interval_sec': 1,
    'dead_node_check_interval_sec': 1,
    'token_refresh_initial_interval_sec': 1,
    'token_refresh_steady_interval_sec': 1,
    'token_distribution_timeout_sec': 300,
}
_CHILD = str(Path(__file__).with_name('child.py'))


class ChildFailed(Exception):
    """A child answered with an error, ended, or did not answer in time."""


class Node:
    """A child process that is, or becomes, one node.

    Args:
        side: Which library it imports.
        name: Its node name.
    """

    def __init__(self, side: Side, name: str) -> None:
        self.name = name
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  # closed by close()
        self._process = subprocess.Popen(
            [side.python, _CHILD, side.module],
            env=side.environ,
            cwd='/',
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
        )
        self._answers: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put('')

    def send(self, do: str, **arguments: Any) -> None:
        """Give a command without waiting for its answer."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({'do': do, **arguments}) + '\n')
            self._process.stdin.flush()
        except OSError as error:
            raise ChildFailed(f'{self.name} has ended: {self._last_words()}') from error

    def receive(self, timeout: float = 60) -> Any:
        """The answer to the oldest command that was not answered yet.

        Raises:
            ChildFailed: There is none within `timeout` seconds, or it is an error.
        """
        try:
            line = self._answers.get(timeout=timeout)
        except queue.Empty:
            raise ChildFailed(f'{self.name} gave no answer within {timeout:g} s') from None
        answer = json.loads(line) if line else {'error': f'has ended: {self._last_words()}'}
        if 'error' in answer:
            raise ChildFailed(f'{self.name}: {answer["error"]}')
        return answer['ok']

    def ask(self, do: str, timeout: float = 60, **arguments: Any) -> Any:
        """Give a command and wait for its answer; see `receive`."""
        self.send(do, **arguments)
        return self.receive(timeout)

    def _last_words(self) -> str:
        self._stderr.seek(0)
        lines = self._stderr.read().decode(errors='replace').strip().splitlines()
        return lines[-1] if lines else 'it said nothing'

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process.poll() is None

    def kill(self) -> None:
        """SIGKILL, and wait until the process is gone."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """End the process, whatever state it is in."""
        self.kill()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        self._stderr.close()


class Databases:
    """Fresh databases on one server, each dropped after its use.

    Args:
        server: How the server is reached, as a superuser.
    """

    def __init__(self, server: CoordinationConfig) -> None:
        self._server = server
        self._numbers = itertools.count(1)

    def query(
        self, statement: sql.Composable | str, dbname: str | None = None
    ) -> list[tuple[Any, ...]]:
        """Run one statement outside of the measured nodes; its rows."""
        server = self._server
        connection = psycopg2.connect(
            host=server.host,
            port=server.port,
            user=server.user,
            password=server.password,
            dbname=dbname or server.dbname,
        )
        try:
            connection.autocommit = True
            with connection.cursor() as cursor:
                cursor.execute(statement)
                return cursor.fetchall() if cursor.description else []
        finally:
            connection.close()

    @contextlib.contextmanager
    def database(self) -> Iterator[dict[str, Any]]:
        """A new database: the settings that reach it."""
        name = f'jobsync_bench_{os.getpid()}_{next(self._numbers)}'
        self.query(sql.SQL('create database {}').format(sql.Identifier(name)))
        try:
            server = self._server
            # The peer puts the password into a URL unescaped, where an empty one reads badly.
            yield {
                'host': server.host,
                'port': server.port,
                'user': server.user,
                'password': server.password or 'none',
                'dbname': name,
            }
        finally:
            self.query(
                sql.SQL('drop database if exists {} with (force)').format(sql.Identifier(name))
            )


class Cluster:
    """Nodes of one side on a database of its own: `with Cluster(...) as cluster`, then `start` and
    `enter`.

    Args:
        databases: Where its database is made.
        side: The library.
        settings: Of the CoordinationConfig.
    """

    def __init__(self, databases: Databases, side: Side, settings: Mapping[str, Any]) -> None:
        self._databases = databases
        self.side = side
        self._settings = dict(settings)
        self._stack = contextlib.ExitStack()
        self.nodes: list[Node] = []
        self.database: dict[str, Any] = {}

    def __enter__(self) -> Cluster:
        self.database = self._stack.enter_context(self._databases.database())
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def spawn(self, name: str) -> Node:
        """A process without a Job."""
        node = Node(self.side, name)
        self._stack.callback(node.close)
        return node

    def start(
        self,
        name: str,
        wait: int = 0,
        locks: Mapping[str, Any] | None = None,
        node: Node | None = None,
        **settings: Any,
    ) -> Node:
        """A process with a Job that is not entered yet. `settings` win over the cluster's."""
        node = node or self.spawn(name)
        node.ask(
            'make',
            name=name,
            wait=wait,
            locks=locks,
            settings={**self.database, **self._settings, **settings},
        )
        self.nodes.append(node)
        return node

    def enter(
        self, nodes: Sequence[Node] | None = None, timeout: float = 300
    ) -> list[dict[str, float]]:
        """Let nodes (all, by default) enter at the same time; what each reports."""
        chosen = self.nodes if nodes is None else nodes
        for node in chosen:
            node.send('enter')
        return [node.receive(timeout) for node in chosen]

    def enter_by_age(self, timeout: float = 300) -> None:
        """Let all nodes enter, each once the one before it is registered, so that the first is the
        oldest, hence the leader.
        """
        deadline = time.monotonic() + 60
        for number, node in enumerate(self.nodes, 1):
            node.send('enter')
            while not self._registered(number):
                if not node.alive or time.monotonic() > deadline:
                    raise ChildFailed(f'{node.name} did not register')
                time.sleep(0.05)
        for node in self.nodes:
            node.receive(timeout)

    def _registered(self, number: int) -> bool:
        """Whether so many nodes are registered; both sides have the table, once it is created."""
        if self.query("select to_regclass('sync_node')") == [(None,)]:
            return False
        return bool(self.query('select count(*) from sync_node')[0][0] >= number)

    def owners(self) -> dict[int, list[str]]:
        """The nodes that say they own each token, of those that are alive."""
        found: dict[int, list[str]] = {}
        for node in self.nodes:
            if node.alive:
                for low, high in node.ask('owned'):
                    for token in range(low, high):
                        found.setdefault(token, []).append(node.name)
        return found

    def query(self, statement: str) -> list[tuple[Any, ...]]:
        """Look into the cluster's database."""
        return self._databases.query(statement, self.database['dbname'])

    def forget(self, node: Node) -> None:
        """Count a node no longer, after it left or was killed."""
        self.nodes.remove(node)
