"""What a Job asks of the node behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from ..assignment.arguments import LockRow
from ..assignment.tokens import TokenSet
from ..ledger.interface import Ledger
from ..protocol.pausing import Pausing
from ..results import AuditedTask, CoordinationStatus, Explanation, LockInfo, NodeInfo

__all__ = ['Node']


class Node(Protocol):
    """A member of something that shares tasks: of a cluster, of nothing, of what a test says.

    The Job has checked the arguments, and whether it is entered. Whatever asks the database raises
    DatabaseUnavailable.
    """

    @property
    def ledger(self) -> Ledger:
        """Its executions."""

    def enter(self, provide: Callable[[], object], is_worker: bool) -> None:
        """Become a member; returns when the first tokens can be claimed. Where it raises, nothing
        is left behind.

        Args:
            provide: Called before tokens are given out: registers locks.
            is_worker: Whether it is the node of a framework's worker, which no plain Job shares a
                cluster with.
        """

    def entered(self, is_bound: Callable[[], bool]) -> None:
        """The Job is entered: the user's callbacks may begin as soon as `is_bound()`."""

    def leave(self, error: BaseException | None) -> None:
        """Stop claiming, write the audit, and leave. Bounded in time; never hides `error`, which
        ends the user's block.
        """

    def leave_child(self, error: BaseException | None) -> None:
        """The same in a forked child, which is no member: its audit alone."""

    def hurry(self) -> None:
        """Its process ends: no call waits long any more for a database that does not answer."""

    @property
    def hurried(self) -> bool:
        """Whether its process ends."""

    def give_up(self) -> None:
        """End an `enter` that another thread waits in."""

    def disown(self, mark: str) -> None:
        """It was not entered and never will be: tell forked children by a mark in place of the
        incarnation.
        """

    def can_claim(self, task: object) -> bool:
        """Whether it may process the task now: a memory look-up. False where it is not a member."""

    def owns(self, task_id: object, group: str = '') -> bool:
        """Whether it owns the task in the queue group, and its lease is valid, at this moment."""

    def enroll(self, groups: Iterable[str]) -> None:
        """Belong to these queue groups and no others, as soon as that is possible."""

    def holds(self, group: str) -> bool:
        """Whether it has tokens of the queue group, or may get some."""

    def group_token_of(self, task_id: object, group: str) -> int | None:
        """The token that an id hashes to in the queue group, on the number line of all groups; None
        where it does not know the group.
        """

    def add(self, task: object) -> None:
        """Record that it processes the task, and remember it for the audit."""

    def record(self, batch: Sequence[object]) -> None:
        """Record that it processes the tasks."""

    def audit(self) -> None:
        """Write what was added to the audit."""

    def get_audit(self) -> list[AuditedTask]:
        """The audited tasks of all nodes."""

    def token_of(self, task_id: object) -> int:
        """The token that an id hashes to."""

    def owner_of(self, task_id: object) -> str | None:
        """Who owns the task; None where nobody does."""

    def explain(self, task_id: object) -> Explanation:
        """Who owns the task and why."""

    @property
    def tokens(self) -> TokenSet:
        """The tokens that it may claim at this moment."""

    @property
    def version(self) -> int:
        """Version of the assignment that it has seen."""

    @property
    def incarnation(self) -> str:
        """Its present life."""

    @property
    def has_lease(self) -> bool:
        """Whether its lease is valid at this moment."""

    @property
    def pausing(self) -> Pausing:
        """Whether the database refuses to begin anything."""

    @property
    def is_healthy(self) -> bool:
        """Whether it can claim, and what keeps it so runs."""

    @property
    def is_running(self) -> bool:
        """Whether it can still claim, or come to."""

    @property
    def leads(self) -> bool:
        """Whether it is the oldest live node and holds a valid lease."""

    def status(self, state: str) -> CoordinationStatus:
        """What it knows of itself, without asking anybody.

        Args:
            state: The Job's: only while that is 'entered' the node has one of its own.
        """

    @property
    def is_alone(self) -> bool:
        """Whether it is the only node there is: nothing tells of others."""

    def list_nodes(self) -> list[NodeInfo]:
        """All members, and whether each is `alive`."""

    def count_active(self) -> int | None:
        """How many members are alive; None where that cannot be known at the moment."""

    def session(self, *, pinned: bool = False) -> AbstractContextManager[Any]:
        """A connection to the cluster's database for one transaction."""

    def rest(self) -> None:
        """Close connections that a burst of work has left idle."""

    def wait_until(self, condition: Callable[[], bool], timeout: float) -> bool:
        """Wait until `condition()` holds, looked at whenever the node has done or heard something;
        whether it does.
        """

    def wake(self) -> None:
        """Have those who wait look at their conditions."""

    def drain(self, timeout: float | None) -> bool:
        """Give all tokens away and stay a member; whether all were given in time."""

    def undrain(self) -> None:
        """Take part again."""

    def stand_aside(self, aside: bool) -> None:
        """Give all tokens away for as long as this node itself cannot use them, or take part again
        unless somebody else has drained it. Not waited for.
        """

    def register_locks(self, rows: Sequence[LockRow]) -> int:
        """Register locks that were checked; returns how many."""

    def list_locks(self) -> list[LockInfo]:
        """All locks."""

    def clear_locks(self, creator: str | None = None) -> int:
        """Delete the locks of a creator, or all; returns how many."""
