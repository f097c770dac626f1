"""What a Job tells of its node, and has it do, whether it is entered or not."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from typing import Any

from ..assignment.tokens import TokenSet
from ..ledger.current import enter_ledger
from ..ledger.interface import Ledger
from ..protocol.pausing import Pausing
from ..task import Task
from .interface import Node

__all__ = ['NodeView']


class NodeView:
    """The part of a Job that is its node's as it stands: there is nothing to check first.

    Args:
        node: The node.
    """

    def __init__(self, node: Node) -> None:
        self._node = node

    def owns(self, task_id: Task | Hashable, group: str = '') -> bool:
        """Whether this node owns the task and its lease is valid, at this moment; no promise goes
        with it, unlike can_claim_task.

        Args:
            task_id: The task.
            group: The queue group in which it is asked for; '' is that of can_claim_task. In other
                groups forked children own nothing.
        """
        return self._node.owns(task_id, group)

    def holds(self, group: str) -> bool:
        """Whether this node has tokens of the queue group, or may get some: from its first wish to
        belong to it until, after it has left, all is given away.
        """
        return self._node.holds(group)

    def token_of(self, task_id: Task | Hashable, group: str = '') -> int | None:
        """The token that a task id hashes to in a queue group, as `on_release` is given it: on the
        number line of all groups. None where this node does not know the group, and owns nothing
        there.
        """
        return self._node.group_token_of(task_id, group)

    @property
    def is_running(self) -> bool:
        """Whether the node is a member, or about to become one; it has not failed, and not left."""
        return self._node.is_running

    @property
    def has_lease(self) -> bool:
        """Whether the node's lease is valid at this moment, in forked children too; without a
        database always True.
        """
        return self._node.has_lease

    @property
    def pausing(self) -> Pausing:
        """Whether the database refuses to begin anything, so that workers do well to take no
        messages for a while.
        """
        return self._node.pausing

    def task_to_token(self, task_id: Task | Hashable) -> int:
        """The token that a task id hashes to; 0 in single-node mode."""
        return self._node.token_of(task_id)

    @property
    def my_tokens(self) -> TokenSet:
        """The tokens that this node may claim at this moment: an immutable set of ints; empty in
        single-node mode.
        """
        return self._node.tokens

    @property
    def token_version(self) -> int:
        """Version of the assignment that this node has seen."""
        return self._node.version

    @property
    def incarnation(self) -> str:
        """This node's present life; a new one after each eviction."""
        return self._node.incarnation

    @property
    def ledger(self) -> Ledger:
        """The executions of this node."""
        return self._node.ledger

    def prepare_fork(self) -> None:
        """Let children that are forked before this Job is entered know its ledger; they begin
        nothing before it is.
        """
        enter_ledger(self._node.ledger)

    def release_child(self, pid: int) -> int:
        """Let others take over what a lost child process was executing; returns how many keys.

        Raises:
            DatabaseUnavailable: Nothing is known to be released; call it again.
        """
        return self._node.ledger.release(pid)

    def hurry(self) -> None:
        """The process ends: from now on nothing waits long for a database that does not answer, in
        forked children neither.
        """
        self._node.hurry()

    @property
    def hurried(self) -> bool:
        """Whether the process ends."""
        return self._node.hurried

    def give_up(self) -> None:
        """End an `__enter__` that another thread waits in; it returns as if entered, and `__exit__`
        is due.
        """
        self._node.give_up()

    def abandon(self, mark: str) -> None:
        """This Job was not entered and never will be: tell forked children by a mark in place of
        the incarnation.
        """
        self._node.disown(mark)

    def session(self, *, pinned: bool = False) -> AbstractContextManager[Any]:
        """A connection to the cluster's database for one transaction. Not in single-node mode.

        Args:
            pinned: Whether names are looked up in PostgreSQL's own schema alone, as for JobSync's
                statements; False: by the role's path.
        """
        return self._node.session(pinned=pinned)

    def rest(self) -> None:
        """Close connections to the database that a burst of work has left idle. Called now and then
        by this node's duties.
        """
        self._node.rest()

    def wait_until(self, condition: Callable[[], bool], timeout: float) -> bool:
        """Wait until `condition()` holds, looked at whenever this node has done or heard something;
        whether it does.
        """
        return self._node.wait_until(condition, timeout)

    def wake(self) -> None:
        """Have those who wait look at their conditions."""
        self._node.wake()
