"""A Job without a cluster and without a database, whose ownership the test sets."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from ..agent.callbacks import Callbacks, with_event
from ..assignment.tokens import TokenSet
from ..config import CoordinationConfig
from ..errors import ConfigurationError
from ..job import Job
from ..ledger.current import enter_ledger, leave_ledger
from ..node.interface import Node
from ..node.participation import Participation
from ..task import Task
from ..worker.node_of_tests import node_of_tests, set_node_of_tests
from .fake_node import FakeNode
from .memory import MemoryLedger

__all__ = ['FakeJob', 'standing_in']

#: As the plugins have it: two ids of a test hardly ever share a token.
_TOTAL_TOKENS = 1_000_000


@contextmanager
def standing_in(job: Job) -> Iterator[Job]:
    """Let the workers of this process, and its exactly-once functions, use this Job, which was
    entered, in place of a node of their own.

    A FakeJob does that by itself. Workers, of whatever broker, then run all that they receive.

    Raises:
        ConfigurationError: Another Job stands in already.
    """
    other = node_of_tests()
    if other is not None and other is not job:
        raise ConfigurationError(
            f'{other!r} stands in already, beside it {job!r} cannot: leave the first one before'
        )
    set_node_of_tests(job)
    enter_ledger(job.ledger)
    try:
        yield job
    finally:
        set_node_of_tests(None)
        leave_ledger(job.ledger)


class FakeJob(Job):
    """A Job for tests: it owns what the test says, keeps its ledger in memory, and remembers what
    was claimed.

    Enter it as a Job. While it is entered, it stands in for the node of workers in this process.
    Takes the arguments of Job too, so that it can be put in the place of the class; those that only
    a cluster needs are ignored.

    Args:
        node_name: The node's name.
        coordination_config: Gives the number of tokens and the hash function; never connected to.
        owned: Ids of the tasks that it owns at first; None: all tasks.
        on_rebalance, on_release: As for Job; called by `own` and `lose`, in the same thread, and
            what they raise is raised. The first call of on_rebalance comes as with a Job, in
            another thread, as soon as the block has begun; whatever is done with this object then
            waits for it, and raises what it raised.
    """

    def __init__(
        self,
        node_name: str = 'test-node',
        coordination_config: CoordinationConfig | None = None,
        date: datetime.date | datetime.datetime | None = None,
        wait_on_enter: float = 0,
        wait_on_exit: float = 0,
        lock_provider: Callable[[Job], object] | None = None,
        clear_existing_locks: bool = False,
        on_rebalance: Callable[..., object] | None = None,
        *,
        on_release: Callable[[TokenSet], object] | None = None,
        weight: float = 1.0,
        resume: bool = False,
        owned: Iterable[Task | Hashable] | None = None,
    ) -> None:
        self._fake = FakeNode(
            node_name,
            coordination_config.total_tokens if coordination_config is not None else _TOTAL_TOKENS,
            coordination_config.hash_function
            if coordination_config is not None
            else 'double_sha256',
            with_event(on_rebalance) if callable(on_rebalance) else None,
            on_release,
        )
        super().__init__(
            node_name,
            None,
            date,
            wait_on_enter,
            wait_on_exit,
            lock_provider,
            clear_existing_locks,
            on_rebalance,
            on_release=on_release,
            weight=weight,
            resume=resume,
        )
        if owned is not None:
            self._fake.owned = self._fake.tokens_of(owned)

    def _make_node(self, participation: Participation, callbacks: Callbacks) -> Node:
        return self._fake

    def own(self, *task_ids: Task | Hashable) -> None:
        """Gain these tasks, or all when none is given."""
        fake = self._fake
        fake.own(fake.owned | fake.tokens_of(task_ids) if task_ids else fake.all)

    def lose(self, *task_ids: Task | Hashable) -> None:
        """Lose these tasks, or all when none is given: `on_release` is called first, then they are
        gone.
        """
        fake = self._fake
        fake.own(fake.owned - fake.tokens_of(task_ids) if task_ids else TokenSet())

    @property
    def healthy(self) -> bool:
        """Whether there is a lease; set it to False, and nothing can be claimed until it is True
        again.
        """
        return self._fake.leased

    @healthy.setter
    def healthy(self, leased: bool) -> None:
        self._fake.leased = leased
        self.wake()

    @property
    def leader(self) -> bool:
        """What `am_i_leader` says while there is a lease; settable."""
        return self._fake.leader

    @leader.setter
    def leader(self, leads: bool) -> None:
        self._fake.leader = leads

    @property
    def ledger(self) -> MemoryLedger:
        """The executions of this node, in memory."""
        return self._fake.ledger

    @property
    def claimed(self) -> list[Any]:
        """Ids of tasks that were recorded by `add_task` or `set_claim`, in order."""
        return self._fake.claimed

    @property
    def added(self) -> list[Any]:
        """Those of `add_task` that were not audited yet."""
        return self._fake.added

    @property
    def audited(self) -> list[Any]:
        """Those that were audited."""
        return self._fake.audited

    @property
    def asked(self) -> list[Any]:
        """Ids that `can_claim_task` was asked for."""
        return self._fake.asked

    @property
    def locks(self) -> dict[str, list[str]]:
        """Task id -> patterns of the locks that were registered."""
        return {task_id: lock['node_patterns'] for task_id, lock in self._fake.locks.items()}

    def _check_entered(self) -> None:
        super()._check_entered()
        self._fake.await_initial()

    def __enter__(self) -> FakeJob:
        """Enter, and stand in for the node of workers in this process; see Job."""
        if node_of_tests() is not None:
            raise ConfigurationError(
                f'{node_of_tests()!r} stands in already, beside it {self!r} cannot: leave the '
                'first one before'
            )
        set_node_of_tests(self)
        try:
            super().__enter__()
        except BaseException:
            self._state = 'exited'
            set_node_of_tests(None)
            leave_ledger(self.ledger)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave; see Job. What was added is audited; after an error, all but the last."""
        if self._state == 'entered' and node_of_tests() is self:
            set_node_of_tests(None)
        super().__exit__(kind, error, trace)
