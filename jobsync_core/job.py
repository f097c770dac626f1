"""The Job: what a user holds while this process is a node of the cluster."""
from __future__ import annotations

import contextlib
import datetime
import os
import threading
import uuid
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, NoReturn

from . import clock
from .agent.agent import Agent
from .agent.callbacks import Callbacks
from .agent.housekeeper import Housekeeper
from .agent.task_claims import TaskBook
from .assignment.arguments import check_date, check_locks, check_name, check_number
from .assignment.hashing import check_task_id
from .assignment.tokens import TokenSet
from .belonging import Belonging, stranger
from .config import CoordinationConfig
from .errors import ConfigurationError, DatabaseUnavailable, JobSyncError, NotEntered
from .ledger.binding import Binding
from .ledger.cluster import DEFAULT_RETENTION, ClusterLedger, Execution
from .ledger.current import enter_ledger, leave_ledger
from .ledger.interface import Ledger
from .ledger.once import once
from .ledger.single import SingleLedger
from .logs import get_logger
from .process import is_known_alive, is_known_dead, this_process
from .protocol.node import Phase, Protocol, Settings
from .protocol.ownership import Claims
from .protocol.pausing import Pausing
from .store import locks as lock_store
from .store import queues, status, tasks
from .store.connection import Sessions
from .store.control import Control
from .store.housekeeping import STATEMENT_SEC
from .store.schema import create_schema
from .store.tables import Tables
from .task import Task, task_id_of

__all__ = ['Job']

logger = get_logger(__name__)

#: Audited tasks beyond which the line about them says this number.
_MOST_COUNTED = 1_000_000
#: In single-node mode nothing refuses.
_NEVER = Pausing()


class Job:
    """One node: enter it, ask it which tasks are yours, leave it.

    Args:
        node_name: This process's name in the cluster, at most 200 characters, without commas.
        coordination_config: The cluster. None is single-node mode: every task is claimable and no database is needed.
        date: The date that claims and the audit belong to; today by default. Of a datetime, its date.
        wait_on_enter: Seconds that entering takes so that other nodes can register; always waited to the end.
        wait_on_exit: Seconds to stay registered, without tokens, when leaving.
        lock_provider: Called with this Job while it enters, to register locks before tokens are given out.
        clear_existing_locks: Delete the locks that a node of this name created, before lock_provider is called.
        on_rebalance: Called, with a RebalanceEvent if it takes an argument, when the tokens of this node change.
        on_release: Called with the tokens that are about to go to other nodes; they go when it returns,
            or after `release_timeout_sec`.
        weight: This node's share relative to the others.
        resume: If this node is the first one of its cluster: tasks that a cluster before, which has ended, audited for the date do not
            run again. By default they do; while a cluster lives they do not, whatever this says.

    Raises:
        ConfigurationError: An argument cannot work.
    """

    def __init__(
        self,
        node_name: str,
        coordination_config: CoordinationConfig | None = None,
        date: datetime.date | datetime.datetime | None = None,
        wait_on_enter: float = 120,
        wait_on_exit: float = 0,
        lock_provider: Callable[[Job], object] | None = None,
        clear_existing_locks: bool = False,
        on_rebalance: Callable[..., object] | None = None,
        *,
        on_release: Callable[[TokenSet], object] | None = None,
        weight: float = 1.0,
        resume: bool = False,
    ) -> None:
        self.node_name = check_name(node_name)
        if coordination_config is not None and not isinstance(coordination_config, CoordinationConfig):
            raise ConfigurationError(f'coordination_config={type(coordination_config).__name__}: give a CoordinationConfig, or None')
        self.config = coordination_config
        self.date = check_date(date)
        self._wait_on_enter = check_number('wait_on_enter', wait_on_enter, 0)
        self._wait_on_exit = check_number('wait_on_exit', wait_on_exit, 0)
        for name, function in (('lock_provider', lock_provider), ('on_rebalance', on_rebalance), ('on_release', on_release)):
            if function is not None and not callable(function):
                raise ConfigurationError(f'{name}={function!r}: give a callable, or None')
        self._lock_provider = lock_provider
        self._clear_existing_locks = clear_existing_locks
        self._callbacks = Callbacks(on_rebalance, on_release)
        self._has_release = on_release is not None
        self._weight = check_number('weight', weight, 1e-6)
        #: What this node belongs to; whoever makes the Job of a worker sets it before entering.
        self.belonging = Belonging()
        if not isinstance(resume, bool):
            raise ConfigurationError(f'resume={resume!r}: give True or False')
        if not isinstance(clear_existing_locks, bool):
            raise ConfigurationError(f'clear_existing_locks={clear_existing_locks!r}: give True or False')
        self._state = 'new'
        self._pid = 0
        if coordination_config is not None:
            self._tables = Tables.of(coordination_config)
            self._sessions = Sessions(coordination_config, f'jobsync {self.node_name}')
            self._process = this_process()
            self._claims = Claims(coordination_config.total_tokens, lambda: is_known_alive(self._process), threading.Lock())
            self._book = TaskBook(
                self._claims, self._sessions, coordination_config, self._tables, self.node_name, self.date, lambda: self.incarnation)
            self._protocol = self._make_protocol(coordination_config)
            self._housekeeper = Housekeeper(coordination_config, self._tables, self.node_name, self._leads)
            self._control = Control(coordination_config, self._tables, self.date, resume)
            self._agent = Agent(
                self._protocol, self._control, coordination_config, self._callbacks,
                self._housekeeper.look)
            self._ledger: Ledger = ClusterLedger(
                self._sessions, self._tables, self.node_name, lambda: self.incarnation, lambda: self.has_lease, self._claims.pausing)
        else:
            self._ledger = SingleLedger()

    def __repr__(self) -> str:
        return f'<Job {self.node_name!r} {self._state}>'

    def __reduce__(self) -> NoReturn:
        raise ConfigurationError(
            f'Job {self.node_name!r} was about to be pickled: a Job cannot be sent to another process, as multiprocessing with spawn or '
            "forkserver does. Use multiprocessing.get_context('fork'), or make and enter a Job of its own there")

    def _make_protocol(self, config: CoordinationConfig) -> Protocol:
        settings = Settings(
            interval=config.heartbeat_interval_sec, timeout=config.heartbeat_timeout_sec, lease=config.lease_sec,
            check_interval=config.rebalance_check_interval_sec, release_timeout=config.release_timeout_sec,
            wait_on_enter=self._wait_on_enter, minimum_nodes=config.minimum_nodes, weight=self._weight,
            total_tokens=config.total_tokens, hash_function=config.hash_function, has_release=self._has_release,
            has_gate=self._lock_provider is not None or self._clear_existing_locks)
        return Protocol(
            self.node_name, settings, self._process, self._claims, new_incarnation=lambda: str(uuid.uuid4()),
            is_known_dead=is_known_dead, promises=self._book.promises)

    # --- entering and leaving ---

    def __enter__(self) -> Job:
        """Join the cluster; returns when this node's first tokens can be claimed.

        Raises:
            ClusterNotFormed: Fewer than `minimum_nodes` after `wait_on_enter`. It is a TimeoutError.
            ConfigMismatch: The live cluster has another total_tokens or hash_function.
            ConfigurationError: The live cluster is that of the workers of Celery or Dramatiq.
            DuplicateNodeName: A live process uses the name.
            DatabaseUnavailable: PostgreSQL cannot be reached.
            NotEntered: This Job was entered before; make another.
        """
        if self._state != 'new':
            raise NotEntered(f'Job {self.node_name!r} was entered before: make a new Job for each `with` block')
        self._state = 'entering'
        self._pid = os.getpid()
        if self.config is not None:
            self._callbacks.hold()
            try:
                create_schema(self.config)
                if not self.belonging.kind:
                    self._refuse_workers(self.config)
                self._join()
                self._tell_audited()
            except BaseException:
                self._callbacks.drop()
                self._leave()
                raise
        enter_ledger(self._ledger)
        self._state = 'entered'
        self._callbacks.go_on(Binding().is_done)
        return self

    def _refuse_workers(self, config: CoordinationConfig) -> None:
        with self._sessions.session() as connection:
            others = queues.peers(connection, self._tables, self.node_name, config.heartbeat_timeout_sec)
        self._sessions.close_all()  # a node that asks nothing more keeps no second connection
        found = stranger(self.belonging, others, config.appname)
        if found is not None:
            raise ConfigurationError(found)

    def _tell_audited(self) -> None:
        """One line where tasks of the date were audited before: whether they run again must not come as a surprise."""
        with contextlib.suppress(JobSyncError):
            if self._control.epochs.begun:
                with self._sessions.session() as connection:
                    number = tasks.count_audits(connection, self._tables, self.date, _MOST_COUNTED)
                if number:
                    logger.info('node=%s date=%s: %d tasks were audited by a cluster that has ended, and run again; resume=True keeps them',
                                self.node_name, self.date, number)
            elif len(self._claims.exclusions):
                logger.info('node=%s date=%s: %d tasks of its tokens are audited already or taken by others, and do not run again here',
                            self.node_name, self.date, len(self._claims.exclusions))

    def _join(self) -> None:
        self._agent.start()
        if self._protocol.settings.has_gate:
            self._agent.wait_for(lambda: self._protocol.phase is not Phase.JOINING or not self._agent.running, None)
            if self._agent.running:
                if self._clear_existing_locks:
                    self.clear_locks_by_creator(self.node_name)
                if self._lock_provider is not None:
                    self._lock_provider(self)
                self._agent.post(self._protocol.open_gate)
        self._agent.wait_entered()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Stop claiming, write the audit, leave the cluster. Bounded in time; never hides an error of the block."""
        if self._state == 'entered' and os.getpid() != self._pid and self.config is not None:
            self._leave_child(error)
        if self._state != 'entered' or os.getpid() != self._pid:
            return  # a forked child that unwinds through the block is no node
        self._state = 'leaving'
        leave_ledger(self._ledger)
        if self.config is not None:
            self._book.close()
        try:
            if self.config is not None:
                self._write_off(error)
            if self.config is not None and self._wait_on_exit:
                self._agent.post(lambda: self._protocol.drain(clock.now()))
                self._agent.wait_for(lambda: not self._agent.running, self._wait_on_exit)
        finally:
            self._ledger.close()
            self._leave()

    def _write_off(self, error: BaseException | None) -> None:
        try:
            self._book.audit(threading.get_ident() if error is not None else None)
            self._book.audit_children()
        except JobSyncError as failure:
            logger.error('node=%s could not write its audit while leaving: %s', self.node_name, failure)
            if error is None:
                raise
            return
        with contextlib.suppress(JobSyncError):  # they lapse with this node
            self._book.release()

    def _leave_child(self, error: BaseException | None) -> None:
        try:
            self._book.leave_child(threading.get_ident() if error is not None else None)
        except JobSyncError as failure:
            # The node's own exit audits it.
            logger.error('node=%s: a child could not write its audit while leaving: %s', self.node_name, failure)

    def _leave(self) -> None:
        if self.config is not None:
            limit = self.config.release_timeout_sec + 2 * self.config.connect_timeout_sec
            self._housekeeper.stop(0)
            if not self._agent.stop(limit):
                logger.warning('node=%s left without telling; its tokens are free after heartbeat_timeout_sec=%s',
                               self.node_name, self.config.heartbeat_timeout_sec)
            self._housekeeper.stop(STATEMENT_SEC + 1.0)
            self._sessions.close_all()
        self._state = 'exited'

    # --- tasks ---

    def can_claim_task(self, task: Task | Hashable) -> bool:
        """Whether this node may process the task now. A memory look-up; after the lease has run out always False.

        Raises:
            InvalidTaskId: The id is None, unhashable, or cannot be stored.
            NotEntered: Outside of the `with` block.
        """
        if self.config is not None:
            return self._book.can_claim(task) or self._refuse()
        self._check_entered()
        check_task_id(task_id_of(task))
        return True

    def owns(self, task_id: Task | Hashable) -> bool:
        """Whether this node owns the task and its lease is valid, at this moment; no promise goes with it, unlike can_claim_task."""
        return self.config is None or self._claims.may_claim(self._book.token_of(task_id_of(task_id)), clock.now())

    @property
    def has_lease(self) -> bool:
        """Whether the node's lease is valid at this moment, in forked children too; without a database always True."""
        return self.config is None or clock.now() < self._claims.deadline

    @property
    def pausing(self) -> Pausing:
        """Whether the database refuses to begin anything, so that workers do well to take no messages for a while."""
        return self._claims.pausing if self.config is not None else _NEVER

    def _refuse(self) -> bool:
        if self._state in ('new', 'exited'):
            self._check_entered()
        return False

    def add_task(self, task: Task | Hashable) -> None:
        """Record durably that this node processes the task, and remember it for the audit. Call it before you process.

        Raises:
            ClaimLost: The task belongs to another node by now; do not process it.
            DatabaseUnavailable: The claim could not be recorded; do not process it.
        """
        self._check_entered()
        if self.config is not None:
            self._book.add(task)
        else:
            check_task_id(task_id_of(task))

    def set_claim(self, task: Task | Hashable | Iterable[Task | Hashable]) -> None:
        """Record durably that this node processes the task, or each of several; unlike add_task not for the audit.

        A str and a tuple are one task id; other iterables are several tasks.

        Raises:
            ClaimLost: One of the tasks belongs to another node; the others are recorded.
            DatabaseUnavailable: Nothing is known to be recorded.
        """
        self._check_entered()
        several = isinstance(task, Iterable) and not isinstance(task, (str, bytes, tuple))
        batch: list[object] = list(task) if several else [task]  # type: ignore[arg-type]
        if self.config is not None:
            self._book.record(batch)

    def write_audit(self) -> None:
        """Write all tasks added since the last call to the audit table; for this `date` they are done.

        Raises:
            DatabaseUnavailable: Nothing was written; call it again.
        """
        self._check_entered()
        if self.config is not None:
            self._book.audit()

    def get_audit(self) -> list[dict[str, Any]]:
        """All audited tasks of this Job's date, of all nodes: dicts with `node` and `task_id`."""
        self._check_entered()
        if self.config is None:
            return []
        with self._sessions.session() as connection:
            return tasks.get_audit(connection, self._tables, self.date)

    def once(
        self, task: Task | Hashable, *, retention: datetime.timedelta | float = DEFAULT_RETENTION,
    ) -> AbstractContextManager[Execution]:
        """Run the block only if the task's key was never completed: `with job.once(task) as execution:`.

        Args:
            task: Its id is the key.
            retention: For how long the completion is remembered: a timedelta, or seconds.

        Raises:
            DuplicateExecution: The key was completed before.
            ExecutionRunning: Another process executes it now.
        """
        self._check_entered()
        return once(self._ledger, check_task_id(task_id_of(task)), retention=retention)

    def task_to_token(self, task_id: Task | Hashable) -> int:
        """The token that a task id hashes to; 0 in single-node mode."""
        return self._book.token_of(task_id_of(task_id)) if self.config is not None else 0

    @property
    def my_tokens(self) -> TokenSet:
        """The tokens that this node may claim at this moment: an immutable set of ints; empty in single-node mode."""
        if self.config is None or clock.now() >= self._claims.deadline:
            return TokenSet()
        return self._claims.tokens

    @property
    def token_version(self) -> int:
        """Version of the assignment that this node has seen."""
        return self._protocol.version if self.config is not None else 0

    @property
    def incarnation(self) -> str:
        """This node's present life; a new one after each eviction."""
        return self._claims.incarnation if self.config is not None else ''

    def owner_of(self, task_id: Task | Hashable) -> str | None:
        """The node that owns the task by the database; None where nobody does."""
        self._check_entered()
        if self.config is None:
            return self.node_name
        with self._sessions.session() as connection:
            return status.owner(connection, self._tables, self.task_to_token(task_id))

    def explain(self, task_id: Task | Hashable) -> dict[str, Any]:
        """Who owns the task and why: token, owner, since, lock, matched pattern, who is next."""
        self._check_entered()
        text = check_task_id(task_id_of(task_id))
        if self.config is None:
            return {'task_id': text, 'token': 0, 'owner': self.node_name}
        with self._sessions.session() as connection:
            return status.explain(connection, self._tables, text, self._book.token_of(text))

    # --- for adapters ---

    def prepare_fork(self) -> None:
        """Let children that are forked before this Job is entered know its ledger; they begin nothing before it is."""
        enter_ledger(self._ledger)

    def release_child(self, pid: int) -> int:
        """Let others take over what a lost child process was executing; returns how many keys.

        Raises:
            DatabaseUnavailable: Nothing is known to be released; call it again.
        """
        return self._ledger.release(pid)

    def give_up(self) -> None:
        """End an `__enter__` that another thread waits in; it returns as if entered, and `__exit__` is due."""
        if self.config is not None:
            self._agent.stop(self.config.release_timeout_sec + 2 * self.config.connect_timeout_sec)

    def abandon(self, mark: str) -> None:
        """This Job was not entered and never will be: tell forked children by a mark in place of the incarnation."""
        if self.config is not None:
            self._claims.incarnation = mark

    def session(self, *, pinned: bool = False) -> AbstractContextManager[Any]:
        """A connection to the cluster's database for one transaction. Not in single-node mode.

        Args:
            pinned: Whether names are looked up in PostgreSQL's own schema alone, as for JobSync's statements; False: by the role's path.
        """
        return self._sessions.session(users=not pinned)

    def rest(self) -> None:
        """Close connections to the database that a burst of work has left idle. Called now and then by this node's keeper."""
        if self.config is not None:
            self._sessions.trim()

    def wait_until(self, condition: Callable[[], bool], timeout: float) -> bool:
        """Wait until `condition()` holds, looked at whenever this node has done or heard something; whether it does."""
        return self._agent.wait_for(condition, timeout)

    def wake(self) -> None:
        """Have those who wait look at their conditions."""
        self._agent.post(lambda: None)

    # --- drain ---

    def drain(self, timeout: float | None = None) -> bool:
        """Give all tokens away and stay a member; returns whether all were given within `timeout` seconds.

        The default waits as long as a hand-over may take: release_timeout_sec + heartbeat_timeout_sec.
        """
        self._check_entered()
        if self.config is None:
            return True
        if timeout is None:
            timeout = self.config.release_timeout_sec + self.config.heartbeat_timeout_sec
        self._agent.post(lambda: self._protocol.drain(clock.now()))
        return self._agent.wait_for(lambda: self._protocol.drained, timeout)

    def undrain(self) -> None:
        """Take part again after `drain`."""
        self._check_entered()
        if self.config is not None:
            self._agent.post(lambda: self._protocol.undrain(clock.now()))

    # --- locks ---

    def register_lock(
        self, task_id: Hashable, node_patterns: str | Sequence[str], reason: str | None = None, expires_in_days: float | None = None,
    ) -> None:
        """Pin a task to nodes by SQL LIKE patterns, tried in order; replaces the task's lock.

        Args:
            task_id: The task.
            node_patterns: A pattern or several; the first that matches a live node counts.
            reason: For people.
            expires_in_days: Days until the lock ends; None never.
        """
        self.register_locks_bulk([(task_id, node_patterns, reason, expires_in_days)])

    def register_locks_bulk(self, locks: Iterable[Sequence[Any]]) -> int:
        """Pin many tasks in one statement: tuples (task_id, node_patterns, reason[, expires_in_days]); returns how many.

        Raises:
            ConfigurationError: A tuple is malformed; the message names it and nothing is registered.
        """
        self._check_member()
        rows = check_locks(locks)
        if self.config is None or not rows:
            return 0
        with self._sessions.session() as connection:
            return lock_store.register(connection, self._tables, rows, self.node_name)

    def list_locks(self) -> list[dict[str, Any]]:
        """All locks: dicts with task_id, node_patterns, reason, created_at, created_by, expires_at."""
        self._check_member()
        if self.config is None:
            return []
        with self._sessions.session() as connection:
            return lock_store.list_locks(connection, self._tables)

    def clear_locks_by_creator(self, creator: str) -> int:
        """Delete the locks that the node named `creator` registered; returns how many."""
        self._check_member()
        if not isinstance(creator, str):
            raise ConfigurationError(f'creator={creator!r:.100}: give the name of the node that registered the locks')
        if self.config is None:
            return 0
        with self._sessions.session() as connection:
            return lock_store.clear_by_creator(connection, self._tables, creator)

    def clear_all_locks(self) -> int:
        """Delete all locks; returns how many."""
        self._check_member()
        if self.config is None:
            return 0
        with self._sessions.session() as connection:
            return lock_store.clear_all(connection, self._tables)

    # --- the cluster ---

    def am_i_healthy(self) -> bool:
        """Whether this node holds a valid lease, that is: it has reached the database recently enough to claim."""
        if self._state != 'entered':
            return False
        return self.config is None or (self._agent.alive and clock.now() < self._claims.deadline)

    @property
    def alive(self) -> bool:
        """Whether the node can still claim, or come to: False once its agent has ended by itself, after which only a restart helps."""
        return self.config is None or self._state != 'entered' or self._agent.running

    def am_i_leader(self) -> bool:
        """Whether this node is the oldest live one and holds a valid lease."""
        return self.config is not None and self.am_i_healthy() and self._leads()

    def _leads(self) -> bool:
        now = clock.now()
        return now < self._claims.deadline and self._protocol.rank(now) == 0

    @property
    def nodes(self) -> list[dict[str, Any]]:
        """The live nodes; see get_active_nodes."""
        return self.get_active_nodes() if self.config is not None else [{'name': self.node_name}]

    def get_active_nodes(self) -> list[dict[str, Any]]:
        """Nodes that have sent a heartbeat within the timeout, oldest first: dicts with name, created_on, last_heartbeat and more."""
        return [node for node in self._list_nodes() if node['alive']]

    def get_dead_nodes(self) -> list[str]:
        """Names of nodes without a heartbeat within the timeout which the leader has not removed yet."""
        return [node['name'] for node in self._list_nodes() if not node['alive']]

    def _list_nodes(self) -> list[dict[str, Any]]:
        self._check_entered()
        if self.config is None:
            return []
        with self._sessions.session() as connection:
            return status.nodes(connection, self._tables, self.config.heartbeat_timeout_sec)

    def get_coordination_status(self) -> dict[str, Any]:
        """What this node knows of itself and the cluster, for people and dashboards. Never raises for a lost database."""
        if self.config is None:
            return {'coordination_enabled': False}
        try:
            active: int | None = len(self.get_active_nodes()) if self._state == 'entered' else None
        except DatabaseUnavailable:
            active = None
        return {**self.local_status(), 'active_nodes': active}

    def local_status(self) -> dict[str, Any]:
        """The part of `get_coordination_status` that needs no database; all of it but `active_nodes`."""
        if self.config is None:
            return {'coordination_enabled': False}
        return {
            'coordination_enabled': True, 'node_name': self.node_name, 'incarnation': self.incarnation,
            'state': self._protocol.state if self._state == 'entered' else self._state,
            'is_leader': self.am_i_leader(), 'healthy': self.am_i_healthy(), 'my_tokens': len(self.my_tokens),
            'token_version': self.token_version, 'total_tokens': self.config.total_tokens,
            'last_heartbeat': self._agent.last_beat, 'lease_remaining_sec': max(0.0, self._claims.deadline - clock.now()),
            'evictions': self._protocol.evictions, 'callback_failures': self._callbacks.failures,
            'callbacks_slow': self._callbacks.slow, 'executions_unsettled': self._ledger.unsettled,
            'recent_events': list(self._agent.events),
        }

    def _check_entered(self) -> None:
        if self._state not in ('entered', 'leaving'):
            raise NotEntered(f'Job {self.node_name!r} is {self._state}: use it inside its `with` block')

    def _check_member(self) -> None:
        if self._state != 'entering':  # lock_provider works while the Job enters
            self._check_entered()
