"""Which tasks this node may take, has taken and has finished: the side of a Job that tasks see."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Iterable
from threading import get_ident

from .. import clock
from ..assignment.hashing import HASH_FUNCTIONS, check_task_id
from ..assignment.tokens import TokenSet
from ..config import CoordinationConfig
from ..errors import ClaimLost
from ..logs import get_logger
from ..protocol import ownership
from ..protocol.exclusions import Exclusions
from ..protocol.ownership import Ownership
from ..store.sessions import Sessions
from ..store.tables import Tables
from ..store.tasks import BATCH, TaskStore
from ..task import Task, task_id_of
from .process_tasks import Added, ProcessTasks
from .promises import Promise

__all__ = ['TaskClaims']

logger = get_logger(__name__)

#: Attempts at recording a claim that is refused although the task is this node's: the leader, or
#: another hand-over of this node, may be rewriting the token's row just then.
_CLAIM_ATTEMPTS = 5
#: Integers below this need no check of their text's length.
_PLAIN = 10**18
_NO_LEASE = memoryview(bytes(8)).cast('d')


class TaskClaims:
    """Claims, promises and the audit of one node.

    A True from `can_claim` is a promise until the same thread asks again or records the task:
    should the token be handed over in between, the promise goes into the claim table with the
    hand-over, and the new owner leaves the task alone. So `can_claim_task → add_task → process`
    runs each task once while tokens move. Once the thread asks again without having recorded the
    task, the promise is taken back, in the background: `can_claim` looks at memory alone.

    Args:
        local: The local token set and lease.
        sessions: Where statements run.
        config: The cluster's settings.
        tables: Names of the tables.
        node: This node's name.
        date: The date of the audit.
        incarnation: Returns the node's present incarnation.
    """

    def __init__(
        self,
        local: Ownership,
        sessions: Sessions,
        config: CoordinationConfig,
        tables: Tables,
        node: str,
        date: datetime.date,
        incarnation: Callable[[], str],
    ) -> None:
        self._ownership = local
        self._sessions = sessions
        self._tables = tables
        self._node = node
        self._date = date
        self._incarnation = incarnation
        self._hash = HASH_FUNCTIONS[config.hash_function]
        self._total_tokens = config.total_tokens
        self._promise_sec = config.heartbeat_timeout_sec
        self._lease, self._bits, self._head = local.lease, local.bits, local.exclusions.head
        self._pid = os.getpid()
        self._own = ProcessTasks(self._node, self._free)
        self._epochs: dict[str, int] = {}

    def can_claim(self, task: object) -> bool:
        """Whether this node may take the task now: one hash, one bit and one comparison, and no
        I/O.

        Raises:
            InvalidTaskId: The id cannot be used.
        """
        # The hot path: look-ups are bound once, and the bit is read here rather than by a call.
        task_id = task.id if type(task) is Task else task_id_of(task)
        text = (
            str(task_id)
            if type(task_id) is int and -_PLAIN < task_id < _PLAIN
            else check_task_id(task_id)
        )
        token = self._hash(text.encode()) % self._total_tokens
        own = self._own
        if ownership.forked and own.pid != os.getpid():
            own = self._start_anew()
        if own.given:
            own.taking_back.give_up(get_ident())
        head, bits = self._head, self._bits
        now, generation = clock.now(), head[0]
        if not (now < self._lease[0] and bits[token >> 3] >> (token & 7) & 1) or (
            ownership.forked and self._ownership.is_orphaned()
        ):
            return self._holds(own, text, now)
        if (
            text in own.done
            or (head[1] and self._ownership.exclusions.excludes(token, text))
            or (own.past is not None and own.past.excludes(token, text))
        ):
            own.promises.pop(get_ident(), None)
            return False
        own.promises[get_ident()] = (text, token, now)
        # The token may have gone between the look and the promise; from here on the hand-over sees
        # the promise. It may even have gone and come back, where the process was stopped: then
        # other tasks are excluded.
        if not bits[token >> 3] >> (token & 7) & 1:
            return False
        return head[0] == generation or self.can_claim(task)

    def token_of(self, task_id: object) -> int:
        """The token that the task id hashes to."""
        return self._hash(check_task_id(task_id).encode()) % self._total_tokens

    def promises(self, tokens: TokenSet) -> tuple[tuple[str, int], ...]:
        """What this node may still do for tokens that it is about to hand over: (task_id, token)
        pairs.
        """
        own = self._own
        now, life = clock.now(), self._incarnation()
        for thread, (text, token, since) in list(own.promises.items()):
            if now - since <= self._promise_sec and token in tokens and text not in own.added:
                own.given[text] = Promise(token, life, since, thread)
        return tuple(
            (text, given.token)
            for text, given in list(own.given.items())
            if given.token in tokens and given.incarnation == life and not given.void
        )

    def record(self, batch: Iterable[object], for_audit: bool = False) -> list[str]:
        """Record durably that this node takes the tasks; returns their ids as text.

        Raises:
            ClaimLost: Another node owns or has taken one of them; the others are recorded.
            DatabaseUnavailable: Nothing is known; do not process the task.
        """
        texts = [check_task_id(task_id_of(task)) for task in batch]
        missing = {text: self.token_of(text) for text in texts}
        own = self._mine()
        child = own.pid if for_audit and own.pid != self._pid else None
        if child is not None:
            self._ownership.note_children()
        for _ in range(_CLAIM_ATTEMPTS):
            if self._ownership.closed and own.pid != self._pid:
                break  # the node is leaving, and has audited what its children took
            life = self._incarnation()
            with self._sessions.session() as connection:
                accepted = TaskStore(connection, self._tables).claim(
                    self._node, life, self._date, list(missing.items()), child
                )
                if for_audit and life not in self._epochs:
                    self._epochs[life] = TaskStore(connection, self._tables).read_epoch()
            for text in accepted:
                missing.pop(text, None)
            # A promise outlives the token in memory: until the hand-over is committed the row still
            # names this node, and from then on there is a claim row. Only a row that is being
            # rewritten shows neither.
            if not any(
                self._ownership.may_claim(token, clock.now()) or self._is_promised(own, text)
                for text, token in missing.items()
            ):
                break
        if missing:
            raise ClaimLost(
                f'task {next(iter(missing))!r} belongs to another node by now, or was taken by '
                'one: do not process it here'
            )
        return texts

    def add(self, task: object) -> None:
        """Record the task as taken, for the audit too; errors as for `record`."""
        (text,) = self.record([task], for_audit=True)
        own = self._own
        thread, life = get_ident(), self._incarnation()
        try:
            last = next(reversed(own.added.values()), None)
        except RuntimeError:  # another thread has added one between the two calls
            last = None
        if last is None or (last.incarnation, last.thread) != (life, thread):
            last = Added(life, thread, self._epochs.get(life, 0))
        own.added.pop(text, None)
        own.added[text] = last
        promise = own.promises.get(thread)
        if promise is not None and promise[0] == text:
            del own.promises[thread]
        own.given.pop(text, None)

    def audit(self, but_last_of: int | None = None) -> int:
        """Write what this process added to the audit; returns how many tasks.

        Args:
            but_last_of: A thread whose last task did not come to its end; that one is left out.

        Raises:
            DatabaseUnavailable: A part was not written; the next call writes it.
        """
        own = self._mine()
        with own.auditing:
            return self._audit(own, but_last_of)

    def _audit(self, own: ProcessTasks, but_last_of: int | None) -> int:
        added = dict(own.added)  # other threads go on adding
        texts = list(added)
        if but_last_of is not None:
            last = next(
                (text for text in reversed(texts) if added[text].thread == but_last_of), None
            )
            if last is not None:
                texts.remove(last)
                logger.warning(
                    'node=%s task=%s was not finished and is not audited', self._node, last
                )
        self._remember(own)
        for start in range(0, len(texts), BATCH):
            epochs: dict[int, list[str]] = {}
            for text in texts[start : start + BATCH]:
                epochs.setdefault(added[text].epoch, []).append(text)
            for epoch, some in epochs.items():
                with self._sessions.session() as connection:
                    TaskStore(connection, self._tables).audit(
                        self._node,
                        self._date,
                        [(text, self.token_of(text)) for text in some],
                        epoch,
                    )
                now = clock.now()
                own.done.update(dict.fromkeys(some, now))
                for text in some:
                    own.added.pop(text, None)
            self._remember(own)
        return len(texts)

    def audit_children(self) -> int:
        """Write what forked children of this node added, and did not audit themselves, to the
        audit; returns how many tasks.

        Asks the database only where a child took something: leaving costs nothing more than before,
        and no outage is an error for a node that has nothing to lose.
        """
        if not self._ownership.children_took:
            return 0
        return self._in_batches(
            lambda connection: TaskStore(connection, self._tables).audit_children(
                self._node, self._incarnation(), self._date
            )
        )

    def leave_child(self, but_last_of: int | None) -> None:
        """A forked child comes to the end of the `with` block: write its audit, and free the task
        that it did not finish.
        """
        own = self._mine()
        self.audit(but_last_of)
        unfinished = list(own.added)
        if unfinished:
            with self._sessions.session() as connection:
                TaskStore(connection, self._tables).release_claims(
                    self._node, self._incarnation(), unfinished
                )

    def close(self) -> None:
        """Answer False from now on, in forked children too."""
        self._ownership.close()
        self._lease = _NO_LEASE

    def release(self) -> None:
        """Delete this node's claims; what was not audited is free."""
        self._in_batches(
            lambda connection: TaskStore(connection, self._tables).release_claims(
                self._node, self._incarnation()
            )
        )

    def _in_batches(self, action: Callable[..., int]) -> int:
        total = 0
        while True:
            with self._sessions.session() as connection:
                number = action(connection)
            total += number
            if number < BATCH:
                return total

    def _mine(self) -> ProcessTasks:
        own = self._own
        return own if not ownership.forked or own.pid == os.getpid() else self._start_anew()

    def _start_anew(self) -> ProcessTasks:
        """In a forked child: what the parent was told, took and will audit stays the parent's."""
        self._own = ProcessTasks(self._node, self._free)
        return self._own

    def _remember(self, own: ProcessTasks) -> None:
        """Move what was audited a while ago to the exclusions, which take less room.

        Not at once: an answer that was on its way meanwhile does not know of it, and replaces what
        is excluded.
        """
        before = clock.now() - self._promise_sec
        old = [text for text, since in own.done.items() if since < before]
        if old:
            tokens, exclusions = self._ownership.tokens, self._ownership.exclusions
            if own.pid != self._pid:
                exclusions = own.past = (
                    own.past if own.past is not None else Exclusions(self._total_tokens)
                )
            # Of tokens that are not here nothing is claimed; what was audited of them is read when
            # they come back.
            placed = [(self.token_of(text), text) for text in old]
            exclusions.add(
                exclusions.keys_of((token, text) for token, text in placed if token in tokens)
            )
            for text in old:
                own.done.pop(text, None)

    def _holds(self, own: ProcessTasks, text: str, now: float) -> bool:
        """Whether this node recorded the task before its token went away: then it still is this
        node's, and nobody else's.
        """
        own.promises.pop(get_ident(), None)
        added = own.added.get(text)
        if added is None or added.incarnation != self._incarnation():
            return False
        return now < self._lease[0] and not (ownership.forked and self._ownership.is_orphaned())

    def _is_promised(self, own: ProcessTasks, text: str) -> bool:
        """Whether this thread was told last that it may take the task, and not too long ago."""
        promise = own.promises.get(get_ident())
        return (
            promise is not None
            and promise[0] == text
            and clock.now() - promise[2] <= self._promise_sec
        )

    def _free(self, text: str, promise: Promise) -> bool:
        """Free a task whose promise was given up; False while its hand-over may not be committed
        yet.
        """
        if self._ownership.closed:  # a node that leaves releases what it has
            return True
        if (
            clock.now() - promise.since > self._promise_sec
            or promise.incarnation != self._incarnation()
        ):
            return True  # it is over, and the leader's housekeeping frees the task
        with self._sessions.session() as connection:
            return TaskStore(connection, self._tables).release_promise(
                self._node, promise.incarnation, self._date, text
            )
