"""A node of a cluster: what its agent, its task claims and its ledger do together."""

from __future__ import annotations

import contextlib
import threading
import uuid
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from .. import clock
from ..agent.agent import Agent
from ..agent.callbacks import Callbacks
from ..agent.housekeeper import Housekeeper
from ..agent.task_claims import TaskClaims
from ..assignment.arguments import LockRow
from ..assignment.groups import GROUP_SPAN, tokens_by_group
from ..assignment.hashing import check_task_id
from ..assignment.tokens import TokenSet
from ..belonging import Belonging, stranger
from ..config import CoordinationConfig
from ..errors import ConfigurationError, DatabaseUnavailable, JobSyncError
from ..ledger.cluster import ClusterLedger
from ..logs import get_logger
from ..process import is_known_alive, is_known_dead, this_process
from ..protocol.node import Phase, Protocol
from ..protocol.ownership import Ownership
from ..protocol.pausing import Pausing
from ..results import AuditedTask, CoordinationStatus, Explanation, LockInfo, NodeInfo
from ..store.cluster import ClusterStore
from ..store.housekeeping import STATEMENT_SEC
from ..store.locks import LockStore
from ..store.queues import QueueStore
from ..store.schema import create_schema
from ..store.sessions import Sessions
from ..store.status import StatusStore
from ..store.tables import Tables
from ..store.tasks import TaskStore
from ..task import task_id_of
from .audited import tell_audited
from .participation import Participation

__all__ = ['ClusterNode']

logger = get_logger(__name__)

#: Seconds for which a node that leaves waits for a database that does not answer; and where that is
#: known already.
_PATIENCE_SEC, _LAST_SEC = 2.0, 0.5


class ClusterNode:
    """A node of a cluster. Methods without a docstring do what `Node` says.

    Args:
        name: Its name.
        config: The cluster.
        participation: How it takes part.
        callbacks: The user's.

    Attributes:
        ownership: Its tokens and its lease.
        tasks: What it has promised, claimed and added.
        protocol: Its state machine; the agent's thread alone touches it.
        agent: Drives it.
    """

    def __init__(
        self,
        name: str,
        config: CoordinationConfig,
        participation: Participation,
        callbacks: Callbacks,
    ) -> None:
        self._name = name
        self._config = config
        self._participation = participation
        self._callbacks = callbacks
        self._tables = Tables.of(config)
        self._sessions = Sessions(config, f'jobsync {name}')
        self._process = this_process()
        self.ownership = Ownership(
            config.total_tokens, lambda: is_known_alive(self._process), threading.Lock()
        )
        self.tasks = TaskClaims(
            self.ownership,
            self._sessions,
            config,
            self._tables,
            name,
            participation.date,
            lambda: self.incarnation,
        )
        self.protocol = self._make_protocol()
        self._housekeeper = Housekeeper(config, self._tables, name, self._is_oldest)
        self._control = ClusterStore(config, self._tables, participation.date, participation.resume)
        self.agent = Agent(self.protocol, self._control, config, callbacks, self._housekeeper.look)
        self.ledger = ClusterLedger(
            self._sessions,
            self._tables,
            name,
            lambda: self.incarnation,
            lambda: self.has_lease,
            self.ownership.pausing,
            config.max_lost,
        )
        #: Bound once: nothing stands between the question and the look-up.
        self.can_claim = self.tasks.can_claim

    def _make_protocol(self) -> Protocol:
        return Protocol(
            self._name,
            self._participation.settings(self._config),
            self._process,
            self.ownership,
            new_incarnation=lambda: str(uuid.uuid4()),
            is_known_dead=is_known_dead,
            promises=self.tasks.promises,
        )

    def enter(self, provide: Callable[[], object], is_worker: bool) -> None:
        """Become a member of the cluster.

        Raises:
            ClusterNotFormed: Fewer than `minimum_nodes` after `wait_on_enter`.
            ConfigMismatch: The live cluster has another total_tokens or hash_function.
            ConfigurationError: The live cluster is that of workers, and this is none.
            DuplicateNodeName: A live process uses the name.
            DatabaseUnavailable: PostgreSQL cannot be reached.
        """
        self._callbacks.hold()
        try:
            create_schema(self._config)
            if not is_worker:
                self._refuse_workers()
            self._join(provide)
            tell_audited(
                self._name,
                self._participation.date,
                self._sessions,
                self._tables,
                begun=self._control.epochs.begun,
                taken=len(self.ownership.exclusions),
            )
        except BaseException:
            self._callbacks.drop()
            self._go()
            raise

    def _refuse_workers(self) -> None:
        with self._sessions.session() as connection:
            others = QueueStore(connection, self._tables).peers(
                self._name, self._config.heartbeat_timeout_sec
            )
        self._sessions.close_all()  # a node that asks nothing more keeps no second connection
        found = stranger(Belonging(), others, self._config.appname)
        if found is not None:
            raise ConfigurationError(found)

    def _join(self, provide: Callable[[], object]) -> None:
        self.agent.start()
        if self._participation.has_gate:
            self.agent.wait_for(
                lambda: self.protocol.phase is not Phase.JOINING or not self.agent.running, None
            )
            if self.agent.running:
                if self._participation.clears_locks:
                    self.clear_locks(self._name)
                provide()
                self.agent.post(self.protocol.open_gate)
        self.agent.wait_entered()

    def entered(self, is_bound: Callable[[], bool]) -> None:
        self._callbacks.go_on(is_bound)

    def hurry(self) -> None:
        self._sessions.hurry()

    @property
    def hurried(self) -> bool:
        return self._sessions.hurried

    def leave(self, error: BaseException | None) -> None:
        self.tasks.close()
        self.hurry()
        try:
            self._write_off(error, releases=self._answers())
            if self._participation.wait_on_exit:
                self.agent.post(lambda: self.protocol.drain(clock.now()))
                self._wait_for(lambda: not self.agent.running, self._participation.wait_on_exit)
        finally:
            self.ledger.close()
            self._go()

    def _answers(self) -> bool:
        """Whether the database answers the agent, as far as is known; waits a moment for it."""

        def is_known() -> bool:
            return not self.agent.running or self.agent.unanswered_sec == 0

        return self._wait_for(is_known, _PATIENCE_SEC)

    def _wait_for(self, condition: Callable[[], bool], timeout: float) -> bool:
        """Wait until a condition holds, while the database answers; whether it does."""
        until = clock.now() + timeout
        while (left := until - clock.now()) > 0 and self.agent.unanswered_sec <= _PATIENCE_SEC:
            if self.agent.wait_for(condition, min(left, _LAST_SEC)):
                return True
        return condition()

    def _write_off(self, error: BaseException | None, releases: bool) -> None:
        try:
            self.tasks.audit(threading.get_ident() if error is not None else None)
            self.tasks.audit_children()
        except JobSyncError as failure:
            logger.error('node=%s could not write its audit while leaving: %s', self._name, failure)
            if error is None:
                raise
            return
        if releases:
            with contextlib.suppress(JobSyncError):  # they lapse with this node
                self.tasks.release()

    def leave_child(self, error: BaseException | None) -> None:
        try:
            self.tasks.leave_child(threading.get_ident() if error is not None else None)
        except JobSyncError as failure:
            # The node's own exit audits it.
            logger.error(
                'node=%s: a child could not write its audit while leaving: %s', self._name, failure
            )

    def _go(self) -> None:
        self._housekeeper.stop(0)
        patience = _LAST_SEC if self._sessions.given_up else _PATIENCE_SEC
        if not self.agent.stop(self._longest_hand_over, patience):
            logger.warning(
                'node=%s left without telling; its tokens are free after heartbeat_timeout_sec=%s',
                self._name,
                self._config.heartbeat_timeout_sec,
            )
        silent = self.agent.unanswered_sec > patience
        self._housekeeper.stop(0 if silent else STATEMENT_SEC + 1.0)
        self._sessions.close_all()

    @property
    def _longest_hand_over(self) -> float:
        return self._config.release_timeout_sec + 2 * self._config.connect_timeout_sec

    def give_up(self) -> None:
        self.agent.stop(self._longest_hand_over, _PATIENCE_SEC)

    def disown(self, mark: str) -> None:
        self.ownership.incarnation = mark

    def owns(self, task_id: object, group: str = '') -> bool:
        token = self.group_token_of(task_id, group)
        return token is not None and self.ownership.may_claim(token, clock.now())

    def enroll(self, groups: Iterable[str]) -> None:
        self.agent.post(lambda: self.protocol.enroll(groups, clock.now()))

    def holds(self, group: str) -> bool:
        return self.protocol.holds(group)

    def group_token_of(self, task_id: object, group: str) -> int | None:
        number = self.protocol.groups.get(group)
        return None if number is None else number * GROUP_SPAN + self.token_of(task_id)

    def add(self, task: object) -> None:
        self.tasks.add(task)

    def record(self, batch: Sequence[object]) -> None:
        self.tasks.record(batch)

    def audit(self) -> None:
        self.tasks.audit()

    def get_audit(self) -> list[AuditedTask]:
        with self._sessions.session() as connection:
            return TaskStore(connection, self._tables).get_audit(self._participation.date)

    def token_of(self, task_id: object) -> int:
        return self.tasks.token_of(task_id_of(task_id))

    def owner_of(self, task_id: object) -> str | None:
        with self._sessions.session() as connection:
            return StatusStore(connection, self._tables).owner(self.token_of(task_id))

    def explain(self, task_id: object) -> Explanation:
        text = check_task_id(task_id_of(task_id))
        with self._sessions.session() as connection:
            return StatusStore(connection, self._tables).explain(text, self.tasks.token_of(text))

    @property
    def tokens(self) -> TokenSet:
        return self.ownership.plain if self.has_lease else TokenSet()

    @property
    def version(self) -> int:
        return self.protocol.version

    @property
    def incarnation(self) -> str:
        return self.ownership.incarnation

    @property
    def has_lease(self) -> bool:
        return clock.now() < self.ownership.deadline

    @property
    def pausing(self) -> Pausing:
        return self.ownership.pausing

    @property
    def is_healthy(self) -> bool:
        return self.agent.alive and self.has_lease

    @property
    def is_running(self) -> bool:
        return self.agent.running

    @property
    def leads(self) -> bool:
        return self.is_healthy and self._is_oldest()

    def _is_oldest(self) -> bool:
        now = clock.now()
        return now < self.ownership.deadline and self.protocol.rank(now) == 0

    def status(self, state: str) -> CoordinationStatus:
        entered = state == 'entered'
        return {
            'coordination_enabled': True,
            'node_name': self._name,
            'incarnation': self.incarnation,
            'state': self.protocol.state if entered else state,
            'is_leader': entered and self.leads,
            'healthy': entered and self.is_healthy,
            'my_tokens': len(self.tokens),
            'groups': tokens_by_group(
                self.ownership.tokens if self.has_lease else TokenSet(),
                self.protocol.groups,
                self._config.total_tokens,
            ),
            'token_version': self.version,
            'total_tokens': self._config.total_tokens,
            'last_heartbeat': self.agent.last_beat,
            'lease_remaining_sec': max(0.0, self.ownership.deadline - clock.now()),
            'evictions': self.protocol.evictions,
            'callback_failures': self._callbacks.failures,
            'callbacks_slow': self._callbacks.slow,
            'executions_unsettled': self.ledger.unsettled,
            'recent_events': list(self.agent.events),
        }

    @property
    def is_alone(self) -> bool:
        return False

    def list_nodes(self) -> list[NodeInfo]:
        with self._sessions.session() as connection:
            return StatusStore(connection, self._tables).nodes(self._config.heartbeat_timeout_sec)

    def count_active(self) -> int | None:
        """How many members are alive; None where the database cannot be asked."""
        try:
            return sum(bool(node['alive']) for node in self.list_nodes())
        except DatabaseUnavailable:
            return None

    def session(self, *, pinned: bool = False) -> AbstractContextManager[Any]:
        return self._sessions.session(users=not pinned)

    def rest(self) -> None:
        self._sessions.trim()

    def wait_until(self, condition: Callable[[], bool], timeout: float) -> bool:
        return self.agent.wait_for(condition, timeout)

    def wake(self) -> None:
        self.agent.wake()

    def drain(self, timeout: float | None) -> bool:
        if timeout is None:
            timeout = self._config.release_timeout_sec + self._config.heartbeat_timeout_sec
        self.agent.post(lambda: self.protocol.drain(clock.now()))
        return self.agent.wait_for(lambda: self.protocol.drained, timeout)

    def undrain(self) -> None:
        self.agent.post(lambda: self.protocol.undrain(clock.now()))

    def stand_aside(self, aside: bool) -> None:
        change = self.protocol.drain if aside else self.protocol.undrain
        self.agent.post(lambda: change(clock.now(), by_itself=True))

    def register_locks(self, rows: Sequence[LockRow]) -> int:
        with self._sessions.session() as connection:
            return LockStore(connection, self._tables).register(rows, self._name)

    def list_locks(self) -> list[LockInfo]:
        with self._sessions.session() as connection:
            return LockStore(connection, self._tables).list_locks()

    def clear_locks(self, creator: str | None = None) -> int:
        with self._sessions.session() as connection:
            if creator is None:
                return LockStore(connection, self._tables).clear_all()
            return LockStore(connection, self._tables).clear_by_creator(creator)
