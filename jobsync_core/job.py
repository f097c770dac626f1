"""The Job: what a user holds while this process is a node of the cluster."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Hashable, Iterable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import NoReturn

from .agent.callbacks import Callbacks
from .assignment.arguments import (
    check_callables,
    check_date,
    check_flags,
    check_groups,
    check_name,
    check_number,
)
from .assignment.hashing import check_task_id
from .assignment.tokens import TokenSet
from .belonging import Belonging
from .config import CoordinationConfig
from .errors import ConfigurationError, NotEntered
from .ledger.binding import Binding
from .ledger.current import enter_ledger, leave_ledger
from .ledger.execution import Execution
from .ledger.limits import DEFAULT_RETENTION
from .ledger.once import once
from .node.cluster import ClusterNode
from .node.interface import Node
from .node.locks import LockView
from .node.participation import Participation
from .node.single import SingleNode
from .results import AuditedTask, CoordinationStatus, Explanation, NodeInfo
from .task import Task, task_id_of

__all__ = ['Job']


class Job(LockView):
    """One node: enter it, ask it which tasks are yours, leave it.

    Args:
        node_name: This process's name in the cluster, at most 200 characters, without commas.
        coordination_config: The cluster. None is single-node mode: every task is claimable and no
            database is needed.
        date: The date that claims and the audit belong to; today by default. Of a datetime, its
            date.
        wait_on_enter: Seconds that entering takes so that other nodes can register; always waited
            to the end.
        wait_on_exit: Seconds to stay registered, without tokens, when leaving.
        lock_provider: Called with this Job while it enters, to register locks before tokens are
            given out.
        clear_existing_locks: Delete the locks that a node of this name created, before
            lock_provider is called.
        on_rebalance: Called, with a RebalanceEvent if it takes an argument, when the tokens of this
            node change.
        on_release: Called with the tokens that are about to go to other nodes; they go when it
            returns, or after `release_timeout_sec`.
        weight: This node's share relative to the others.
        resume: If this node is the first one of its cluster: tasks that a cluster before, which has
            ended, audited for the date do not run again. By default they do; while a cluster lives
            they do not, whatever this says.
        groups: Names of the queue groups that this node belongs to at first. In each the tasks have
            owners of their own, among its members alone.

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
        groups: Iterable[str] = (),
    ) -> None:
        self.node_name = check_name(node_name)
        if coordination_config is not None and not isinstance(
            coordination_config, CoordinationConfig
        ):
            raise ConfigurationError(
                f'coordination_config={type(coordination_config).__name__}: give a '
                'CoordinationConfig, or None'
            )
        self.config = coordination_config
        self.date = check_date(date)
        check_flags(resume=resume, clear_existing_locks=clear_existing_locks)
        check_callables(
            lock_provider=lock_provider, on_rebalance=on_rebalance, on_release=on_release
        )
        participation = Participation(
            self.date,
            check_number('wait_on_enter', wait_on_enter, 0),
            check_number('wait_on_exit', wait_on_exit, 0),
            check_number('weight', weight, 1e-6),
            resume,
            clear_existing_locks,
            has_gate=lock_provider is not None or clear_existing_locks,
            has_release=on_release is not None,
            groups=check_groups(groups),
        )
        self._lock_provider = lock_provider
        #: What this node belongs to; whoever makes the Job of a worker sets it before entering.
        self.belonging = Belonging()
        self._state = 'new'
        self._pid = 0
        super().__init__(self._make_node(participation, Callbacks(on_rebalance, on_release)))
        # Claiming is a memory look-up: the way to it is found once.
        self._can_claim = self._node.can_claim

    def _make_node(self, participation: Participation, callbacks: Callbacks) -> Node:
        """What stands behind this Job: the only place that asks whether there is a cluster."""
        if self.config is None:
            return SingleNode(self.node_name)
        return ClusterNode(self.node_name, self.config, participation, callbacks)

    def __repr__(self) -> str:
        return f'<Job {self.node_name!r} {self._state}>'

    def __reduce__(self) -> NoReturn:
        raise ConfigurationError(
            f'Job {self.node_name!r} was about to be pickled: a Job cannot be sent to another '
            'process, as multiprocessing with spawn or '
            "forkserver does. Use multiprocessing.get_context('fork'), or make and enter a Job of "
            'its own there'
        )

    def __enter__(self) -> Job:
        """Join the cluster; returns when this node's first tokens can be claimed.

        Raises:
            ClusterNotFormed: Fewer than `minimum_nodes` after `wait_on_enter`. It is a
                TimeoutError.
            ConfigMismatch: The live cluster has another total_tokens or hash_function.
            ConfigurationError: The live cluster is that of the workers of Celery or Dramatiq.
            DuplicateNodeName: A live process uses the name.
            DatabaseUnavailable: PostgreSQL cannot be reached.
            NotEntered: This Job was entered before; make another.
        """
        if self._state != 'new':
            raise NotEntered(
                f'Job {self.node_name!r} was entered before: make a new Job for each `with` block'
            )
        self._state = 'entering'
        self._pid = os.getpid()
        try:
            self._node.enter(self._provide_locks, is_worker=bool(self.belonging.kind))
        except BaseException:
            self._state = 'exited'
            raise
        enter_ledger(self._node.ledger)
        self._state = 'entered'
        self._node.entered(Binding().is_done)
        return self

    def _provide_locks(self) -> None:
        if self._lock_provider is not None:
            self._lock_provider(self)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop claiming, write the audit, leave the cluster. Bounded in time; never hides an error
        of the block.
        """
        if self._state != 'entered':
            return
        if os.getpid() != self._pid:  # a forked child that unwinds through the block is no node
            self._node.leave_child(error)
            return
        self._state = 'leaving'
        leave_ledger(self._node.ledger)
        try:
            self._node.leave(error)
        finally:
            self._state = 'exited'

    def can_claim_task(self, task: Task | Hashable) -> bool:
        """Whether this node may process the task now. A memory look-up; after the lease has run out
        always False.

        Raises:
            InvalidTaskId: The id is None, unhashable, or cannot be stored.
            NotEntered: Outside of the `with` block.
        """
        return self._can_claim(task) or self._refuse()

    def _refuse(self) -> bool:
        if self._state in ('new', 'exited'):
            self._check_entered()
        return False

    def add_task(self, task: Task | Hashable) -> None:
        """Record durably that this node processes the task, and remember it for the audit. Call it
        before you process.

        Raises:
            ClaimLost: The task belongs to another node by now; do not process it.
            DatabaseUnavailable: The claim could not be recorded; do not process it.
        """
        self._check_entered()
        self._node.add(task)

    def set_claim(self, task: Task | Hashable | Iterable[Task | Hashable]) -> None:
        """Record durably that this node processes the task, or each of several; unlike add_task not
        for the audit.

        A str and a tuple are one task id; other iterables are several tasks.

        Raises:
            ClaimLost: One of the tasks belongs to another node; the others are recorded.
            DatabaseUnavailable: Nothing is known to be recorded.
        """
        self._check_entered()
        several = isinstance(task, Iterable) and not isinstance(task, (str, bytes, tuple))
        batch: list[object] = list(task) if several else [task]  # type: ignore[arg-type]
        self._node.record(batch)

    def write_audit(self) -> None:
        """Write all tasks added since the last call to the audit table; for this `date` they are
        done.

        Raises:
            DatabaseUnavailable: Nothing was written; call it again.
        """
        self._check_entered()
        self._node.audit()

    def get_audit(self) -> list[AuditedTask]:
        """All audited tasks of this Job's date, of all nodes: dicts with `node` and `task_id`."""
        self._check_entered()
        return self._node.get_audit()

    def once(
        self, task: Task | Hashable, *, retention: datetime.timedelta | float = DEFAULT_RETENTION
    ) -> AbstractContextManager[Execution]:
        """Run the block only if the task's key was never completed: `with job.once(task) as
        execution:`.

        Args:
            task: Its id is the key.
            retention: For how long the completion is remembered: a timedelta, or seconds.

        Raises:
            DuplicateExecution: The key was completed before.
            ExecutionRunning: Another process executes it now.
        """
        self._check_entered()
        return once(self._node.ledger, check_task_id(task_id_of(task)), retention=retention)

    def owner_of(self, task_id: Task | Hashable) -> str | None:
        """The node that owns the task by the database; None where nobody does."""
        self._check_entered()
        return self._node.owner_of(task_id)

    def explain(self, task_id: Task | Hashable) -> Explanation:
        """Who owns the task and why: token, owner, since, lock, matched pattern, who is next."""
        self._check_entered()
        return self._node.explain(task_id)

    def drain(self, timeout: float | None = None) -> bool:
        """Give all tokens away and stay a member; returns whether all were given within `timeout`
        seconds.

        The default waits as long as a hand-over may take: release_timeout_sec +
        heartbeat_timeout_sec.

        Raises:
            ConfigurationError: `timeout` is no number of seconds.
        """
        self._check_entered()
        return self._node.drain(
            check_number('timeout', timeout, 0) if timeout is not None else None
        )

    def undrain(self) -> None:
        """Take part again after `drain`."""
        self._check_entered()
        self._node.undrain()

    def stand_aside(self, aside: bool = True) -> None:
        """Give all tokens away for as long as this node cannot use them, as a worker does that is
        cut off from its broker; or take part again, unless an operator or `drain` has drained the
        node meanwhile. Not waited for.

        Args:
            aside: False: take part again.
        """
        self._check_entered()
        self._node.stand_aside(aside)

    def enroll(self, groups: Iterable[str]) -> None:
        """Belong to these queue groups, and no others, as soon as the database knows. Of a group
        that is left, what this node owns is handed over before: see `holds`.

        Raises:
            ConfigurationError: One of these can be no queue's name.
        """
        self._check_member()
        self._node.enroll(check_groups(groups))

    def am_i_healthy(self) -> bool:
        """Whether this node holds a valid lease, that is: it has reached the database recently
        enough to claim.
        """
        return self._state == 'entered' and self._node.is_healthy

    @property
    def alive(self) -> bool:
        """Whether the node can still claim, or come to: False once its agent has ended by itself,
        after which only a restart helps.
        """
        return self._state != 'entered' or self._node.is_running

    def am_i_leader(self) -> bool:
        """Whether this node is the oldest live one and holds a valid lease."""
        return self._state == 'entered' and self._node.leads

    @property
    def nodes(self) -> list[NodeInfo]:
        """The live nodes, as `get_active_nodes` gives them; in single-node mode this one's name."""
        return [{'name': self.node_name}] if self._node.is_alone else self.get_active_nodes()

    def get_active_nodes(self) -> list[NodeInfo]:
        """Nodes that have sent a heartbeat within the timeout, oldest first: dicts with name,
        created_on, last_heartbeat and more.
        """
        self._check_entered()
        return [node for node in self._node.list_nodes() if node['alive']]

    def get_dead_nodes(self) -> list[str]:
        """Names of nodes without a heartbeat within the timeout which the leader has not removed
        yet.
        """
        self._check_entered()
        return [node['name'] for node in self._node.list_nodes() if not node['alive']]

    def get_coordination_status(self) -> CoordinationStatus:
        """What this node knows of itself and the cluster, for people and dashboards. Never raises
        for a lost database.
        """
        known = self.local_status()
        if known['coordination_enabled']:
            known['active_nodes'] = self._node.count_active() if self._state == 'entered' else None
        return known

    def local_status(self) -> CoordinationStatus:
        """The part of `get_coordination_status` that needs no database; all of it but
        `active_nodes`.
        """
        return self._node.status(self._state)

    def _check_entered(self) -> None:
        if self._state not in ('entered', 'leaving'):
            raise NotEntered(
                f'Job {self.node_name!r} is {self._state}: use it inside its `with` block'
            )

    def _check_member(self) -> None:
        if self._state != 'entering':  # lock_provider works while the Job enters
            self._check_entered()
