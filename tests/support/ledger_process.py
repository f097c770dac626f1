"""A worker that executes keys for test_ledger_kill, and the dispatcher that gives keys to workers
and kills them.

Workers are forked from a clean server process, so that a new one costs milliseconds. Each is a node
of its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import random
import signal
import uuid
from collections import Counter, deque
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from typing import Any, cast

import psycopg2

from jobsync_core.config import CoordinationConfig
from jobsync_core.errors import ClaimLost, DuplicateExecution, ExecutionRunning, Fenced
from jobsync_core.ledger.cluster import ClusterLedger
from jobsync_core.ledger.execution import Execution
from jobsync_core.ledger.once import once
from jobsync_core.store.sessions import Sessions
from jobsync_core.store.statements import Statement, catalog
from jobsync_core.store.tables import Tables
from tests.support.rows import Rows

__all__ = ['EFFECTS', 'FORMS', 'Dispatcher', 'connect', 'form_of']

#: How a key's effect is written, by what its name begins with: in a transaction of the ledger's, in
#: one of the worker's own, or beside the ledger.
FORMS = ('transaction', 'cursor', 'plain')
#: Every effect is a row, and so is every time that a row of the ledger is said to be 'done', but
#: for the storing of a result that comes afterwards: PostgreSQL itself counts them.
EFFECTS = """
CREATE TABLE effect (key text NOT NULL, fence bigint NOT NULL);
CREATE TABLE completion (key text NOT NULL, fence bigint NOT NULL);
CREATE FUNCTION count_completion() RETURNS trigger LANGUAGE plpgsql SET search_path = public AS $$
BEGIN
    INSERT INTO completion VALUES (NEW.key, NEW.fence);
    RETURN NEW;
END $$;
CREATE TRIGGER count_new_completion AFTER INSERT ON {execution}
    FOR EACH ROW WHEN (NEW.state = 'done') EXECUTE FUNCTION count_completion();
CREATE TRIGGER count_completion AFTER UPDATE ON {execution}
    FOR EACH ROW WHEN (
        NEW.state = 'done' AND (OLD.state, OLD.fence, OLD.finished_at)
            IS DISTINCT FROM (NEW.state, NEW.fence, NEW.finished_at)
    ) EXECUTE FUNCTION count_completion();
"""
_POINTS = ('before begin', 'after begin', 'after effect', 'after completion')
_BATCH = 8
_FENCE = 'AND fence OPERATOR(pg_catalog.=) %s'
_EFFECT = 'INSERT INTO effect VALUES (%s, %s)'


def connect(config: CoordinationConfig) -> Any:
    """A connection of the test's own, in autocommit mode."""
    connection = psycopg2.connect(
        host=config.host,
        port=config.port,
        dbname=config.dbname,
        user=config.user,
        password=config.password,
    )
    connection.autocommit = True
    return connection


def form_of(key: str) -> str:
    """The form of a key's effect."""
    return key.partition('-')[0]


class _Worker:
    """Runs in the process: executes keys, and dies where it is told to."""

    def __init__(self, config: CoordinationConfig, node: str, incarnation: str) -> None:
        self.ledger = ClusterLedger(
            Sessions(config, node), Tables(config.appname), node, lambda: incarnation
        )
        self.own = connect(config)

    def pass_point(self, point: str, fate: str) -> None:
        if fate == f'die {point}':
            os.kill(os.getpid(), signal.SIGKILL)
        if fate == f'pause {point}':
            os.kill(os.getpid(), signal.SIGSTOP)

    def execute(self, key: str, fate: str) -> str:
        self.pass_point('before begin', fate)
        try:
            with once(self.ledger, key, retention=3600) as execution:
                self.pass_point('after begin', fate)
                getattr(self, form_of(key))(execution, fate)
        except DuplicateExecution:
            return 'duplicate'
        except ExecutionRunning:
            return 'running'
        except ClaimLost:
            return 'evicted'
        except Fenced:
            return 'fenced'
        self.pass_point('after completion', fate)
        return 'completed'

    def transaction(self, execution: Execution, fate: str) -> None:
        with execution.transaction() as connection, connection.cursor() as cursor:
            cursor.execute(_EFFECT, (execution.key, execution.fence))
            self.pass_point('after effect', fate)

    def cursor(self, execution: Execution, fate: str) -> None:
        with self.own.cursor() as cursor:
            cursor.execute('BEGIN')
            try:
                cursor.execute(_EFFECT, (execution.key, execution.fence))
                self.pass_point('after effect', fate)
                execution.complete(cursor)
            except BaseException:
                cursor.execute('ROLLBACK')
                raise
            cursor.execute('COMMIT')

    def plain(self, execution: Execution, fate: str) -> None:
        with self.own.cursor() as cursor:
            cursor.execute(_EFFECT, (execution.key, execution.fence))
        self.pass_point('after effect', fate)


def _take_the_fence_out() -> None:
    pieces = cast('dict[str, Statement]', catalog().pieces)
    statements = cast('dict[str, Statement]', catalog().statements)
    completing = pieces['completing']
    assert _FENCE in completing.text
    open_to_all = completing.text.replace(_FENCE, 'AND %s IS NOT NULL')
    pieces['completing'] = dataclasses.replace(completing, text=open_to_all)
    names = ('result', 'retention', 'key', 'fence')
    statements['execution.finish'] = dataclasses.replace(
        statements['execution.finish'],
        text=open_to_all.partition('AND (state')[0] % tuple(f'%({name})s' for name in names),
    )


def run_worker(
    fields: dict[str, Any], node: str, incarnation: str, pipe: Connection, fenceless: bool
) -> None:
    """The process: executes what comes through the pipe, in order, and answers each."""
    if fenceless:
        _take_the_fence_out()
    worker = _Worker(CoordinationConfig(**fields), node, incarnation)
    pipe.send(('ready', ''))
    while True:
        try:
            key, fate = pipe.recv()
        except EOFError:
            return
        pipe.send((worker.execute(key, fate), key))


@dataclasses.dataclass
class _Slot:
    node: str
    process: ForkServerProcess
    pipe: Connection
    sent: deque[tuple[str, str]] = dataclasses.field(default_factory=deque)
    ready: bool = False


class Dispatcher:
    """Delivers each key at least `deliveries` times, until each delivery is answered, while it
    kills and pauses workers.

    Args:
        rows: The cluster, in whose database `EFFECTS` exist.
        seed: Of every choice.
        workers: How many live at a time.
        death: Chance that a delivery is a worker's death, at a point drawn at random.
        pause: Chance that a worker stops within a delivery, is evicted, and goes on after others
            finished its key.
        fenceless: Take the fence out of the statement that records completions.
    """

    def __init__(
        self,
        rows: Rows,
        seed: int,
        workers: int = 3,
        death: float = 0.02,
        pause: float = 0.004,
        fenceless: bool = False,
    ) -> None:
        self._random = random.Random(seed)
        self._rows = rows
        self._fields = {
            item.name: getattr(rows.config, item.name) for item in dataclasses.fields(rows.config)
        }
        self._context = multiprocessing.get_context('forkserver')
        self._context.set_forkserver_preload([__name__])
        self._count = workers
        self._death = death
        self._pause = pause
        self._fenceless = fenceless
        self._slots: list[_Slot] = []
        self._stopped: list[tuple[_Slot, set[str]]] = []
        self.outcomes: Counter[str] = Counter()

    def run(self, keys: list[str], deliveries: int = 2) -> None:
        """Deliver all keys, and wait for all answers."""
        apart = [key for key in keys for _ in range(deliveries)]
        self._random.shuffle(apart)
        # Every tenth key comes once more right away.
        queue = deque(
            copy for key in apart for copy in [key] * (2 if self._random.random() < 0.1 else 1)
        )
        try:
            while len(self._slots) < self._count:
                self._start()
            while queue or self._stopped or any(slot.sent for slot in self._slots):
                self._step(queue)
        finally:
            for slot in [*self._slots, *(slot for slot, _ in self._stopped)]:
                slot.process.kill()
                slot.process.join()
                slot.pipe.close()

    def _step(self, queue: deque[str]) -> None:
        # One message at a time to each, so that the deliveries of a key that stand side by side
        # meet.
        hungry = [slot for slot in self._slots if slot.ready and len(slot.sent) < _BATCH // 2]
        for _ in range(_BATCH - _BATCH // 2):
            for slot in hungry:
                if queue:
                    self._send(slot, queue.popleft())
        if not any(slot.sent or not slot.ready for slot in self._slots):
            self._resume()  # everything else is done
        sources: dict[Any, _Slot] = {slot.pipe: slot for slot in self._slots}
        sources.update({slot.process.sentinel: slot for slot in self._slots})
        changed = wait(list(sources), timeout=0.05)
        for slot in {id(sources[item]): sources[item] for item in changed}.values():
            self._receive(slot, queue)
        for slot in list(self._slots):
            if slot.sent and slot.sent[0][1].startswith('pause') and _is_stopped(slot.process.pid):
                self._evict(slot, queue)

    def _send(self, slot: _Slot, key: str) -> None:
        drawn = self._random.random()
        fate = ''
        if drawn < self._death:
            fate = f'die {self._random.choice(_POINTS)}'
        elif drawn < self._death + self._pause:
            fate = f'pause {self._random.choice(_POINTS[1:3])}'
        slot.sent.append((key, fate))
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            slot.pipe.send((key, fate))

    def _receive(self, slot: _Slot, queue: deque[str]) -> None:
        try:
            while slot.pipe.poll():
                outcome, key = slot.pipe.recv()
                if outcome == 'ready':
                    slot.ready = True
                    continue
                slot.sent.popleft()
                self._answer(outcome, key, queue)
        except (EOFError, ConnectionResetError):
            pass
        if slot.process.exitcode is not None:
            self._bury(slot, queue)

    def _answer(self, outcome: str, key: str, queue: deque[str]) -> None:
        self.outcomes[outcome] += 1
        if outcome in ('running', 'evicted', 'fenced'):
            queue.append(key)
        for _, awaited in self._stopped:
            if outcome in ('completed', 'duplicate'):
                awaited.discard(key)
        if any(not awaited for _, awaited in self._stopped):
            self._resume()

    def _bury(self, slot: _Slot, queue: deque[str]) -> None:
        """A worker died. Its messages come back; its node row goes, or is left to those who can
        tell that its process is gone.
        """
        slot.process.join()
        slot.pipe.close()
        self._slots.remove(slot)
        self.outcomes['killed'] += 1
        queue.extend(key for key, _ in slot.sent)
        if self._random.random() < 0.5:
            self._delete_node(slot.node)
        self._start()

    def _evict(self, slot: _Slot, queue: deque[str]) -> None:
        """A worker stands still within an execution. The cluster goes on without it, and it wakes
        when others did its work.
        """
        self.outcomes['paused'] += 1
        self._slots.remove(slot)
        self._delete_node(slot.node)
        key = slot.sent[0][0]
        queue.extend(key for key, _ in slot.sent)
        queue.appendleft(key)
        self._stopped.append((slot, {key}))
        self._start()

    def _resume(self) -> None:
        for slot, awaited in list(self._stopped):
            if awaited and any(other.sent for other in self._slots):
                continue
            self._stopped.remove((slot, awaited))
            os.kill(slot.process.pid or 0, signal.SIGCONT)
            # What it answers is the late end of its attempt; what was sent to it after that was
            # delivered to others.
            with contextlib.suppress(EOFError, ConnectionResetError):
                for _ in range(len(slot.sent)):
                    assert slot.pipe.poll(30), 'a worker that was resumed did not answer'
                    outcome, _ = slot.pipe.recv()
                    self.outcomes[f'late {outcome}'] += 1
            slot.process.kill()
            slot.process.join()
            slot.pipe.close()

    def _start(self) -> None:
        node, incarnation = (
            f'worker-{uuid.UUID(int=self._random.getrandbits(128))}',
            str(uuid.UUID(int=self._random.getrandbits(128))),
        )
        self._rows.node(node, incarnation=incarnation)
        ours, theirs = self._context.Pipe()
        process = self._context.Process(
            target=run_worker,
            args=(self._fields, node, incarnation, theirs, self._fenceless),
            daemon=True,
        )
        process.start()
        theirs.close()
        self._slots.append(_Slot(node, process, ours))

    def _delete_node(self, node: str) -> None:
        self._rows.run(f'DELETE FROM {self._rows.tables.node} WHERE name = %s', node)


def _is_stopped(pid: int | None) -> bool:
    try:
        with open(f'/proc/{pid}/stat') as stat:
            return stat.read().rpartition(')')[2].split()[0] == 'T'
    except OSError:
        return False
