"""Which tasks this node may take, has taken and has finished: the side of a Job that tasks see."""
from __future__ import annotations

import datetime
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from threading import get_ident

from . import claims, clock
from .claims import Claims
from .config import CoordinationConfig
from .errors import ClaimLost, JobSyncError
from .hashing import HASH_FUNCTIONS, check_task_id, task_key
from .logs import get_logger
from .store import tasks
from .store.connection import Sessions
from .store.schema import Tables
from .task import Task, task_id_of
from .tokens import TokenSet

__all__ = ['TaskBook']

logger = get_logger(__name__)

#: Attempts at recording a claim that is refused although the task is this node's: the leader, or another hand-over of this
#: node, may be rewriting the token's row just then.
_CLAIM_ATTEMPTS = 5
#: Integers below this need no check of their text's length.
_PLAIN = 10**18
#: Seconds between two attempts at taking a promise back.
_RETRY_SEC = 0.1
_NO_LEASE = memoryview(bytes(8)).cast('d')


@dataclass
class _Given:
    """A promise whose token went away: it is recorded together with the hand-over."""

    token: int
    incarnation: str
    since: float
    thread: int
    void: bool = False
    retry_at: float = 0.0


class TaskBook:
    """Claims, promises and the audit of one node.

    A True from `can_claim` is a promise until the same thread asks again or records the task: should the token be handed
    over in between, the promise goes into the claim table with the hand-over, and the new owner leaves the task alone. So
    `can_claim_task → add_task → process` runs each task once while tokens move. Once the thread asks again without having
    recorded the task, the promise is taken back.

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
        self, local: Claims, sessions: Sessions, config: CoordinationConfig, tables: Tables, node: str, date: datetime.date,
        incarnation: Callable[[], str],
    ) -> None:
        self._claims = local
        self._sessions = sessions
        self._tables = tables
        self._node = node
        self._date = date
        self._incarnation = incarnation
        self._hash = HASH_FUNCTIONS[config.hash_function]
        self._total_tokens = config.total_tokens
        self._promise_sec = config.heartbeat_timeout_sec
        self._lease = local.lease
        # thread id -> (text, token, when): what the thread was told last
        self._promises: dict[int, tuple[str, int, float]] = {}
        self._given: dict[str, _Given] = {}
        # text -> (incarnation, thread id): recorded by add_task, not audited yet; the newest last
        self._added: dict[str, tuple[str, int]] = {}
        # texts audited here: done for the date, as tasks are that others audited
        self._done: set[str] = set()

    def can_claim(self, task: object) -> bool:
        """Whether this node may take the task now: one hash, one bit and one comparison.

        Raises:
            InvalidTaskId: The id cannot be used.
            DatabaseUnavailable: The task may have been taken by another node, and the database cannot be asked.
        """
        # The hot path: look-ups are bound once, and the bit is read here rather than by a call.
        task_id = task.id if type(task) is Task else task_id_of(task)
        text = str(task_id) if type(task_id) is int and -_PLAIN < task_id < _PLAIN else check_task_id(task_id)
        token = self._hash(text.encode()) % self._total_tokens
        now = clock.now()
        if self._given:
            self._take_back(now)
        bits = self._claims.bits
        if not (now < self._lease[0] and bits[token >> 3] >> (token & 7) & 1) or (claims.forked and self._claims.is_orphaned()):
            return self._holds(text, now)
        if text in self._done:
            return False
        if self._claims.excluded and task_key(text) in self._claims.excluded and self._taken(text):
            return False
        self._promises[get_ident()] = (text, token, now)
        # The token may have gone between the look and the promise; from here on the hand-over sees the promise.
        return bits[token >> 3] >> (token & 7) & 1 == 1

    def token_of(self, task_id: object) -> int:
        """The token that the task id hashes to."""
        return self._hash(check_task_id(task_id).encode()) % self._total_tokens

    def promises(self, tokens: TokenSet) -> tuple[tuple[str, int], ...]:
        """What this node may still do for tokens that it is about to hand over: (task_id, token) pairs."""
        now = clock.now()
        for thread, (text, token, since) in list(self._promises.items()):
            if now - since <= self._promise_sec and token in tokens and text not in self._added:
                self._given[text] = _Given(token, self._incarnation(), since, thread)
        return tuple(
            (text, given.token) for text, given in list(self._given.items())
            if given.token in tokens and given.incarnation == self._incarnation() and not given.void)

    def record(self, batch: Iterable[object]) -> list[str]:
        """Record durably that this node takes the tasks; returns their ids as text.

        Raises:
            ClaimLost: Another node owns or has taken one of them; the others are recorded.
            DatabaseUnavailable: Nothing is known; do not process the task.
        """
        texts = [check_task_id(task_id_of(task)) for task in batch]
        missing = {text: self.token_of(text) for text in texts}
        for _ in range(_CLAIM_ATTEMPTS):
            with self._sessions.session() as connection:
                accepted = tasks.claim(
                    connection, self._tables, self._node, self._incarnation(), self._date, list(missing.items()))
            for text in accepted:
                missing.pop(text, None)
            # A promise outlives the token in memory: until the hand-over is committed the row still names this node, and from
            # then on there is a claim row. Only a row that is being rewritten shows neither.
            if not any(self._claims.may_claim(token, clock.now()) or self._is_promised(text) for text, token in missing.items()):
                break
        if missing:
            raise ClaimLost(f'task {next(iter(missing))!r} belongs to another node by now, or was taken by one: do not process it here')
        return texts

    def add(self, task: object) -> None:
        """Record the task as taken, for the audit too; errors as for `record`."""
        text, = self.record([task])
        thread = get_ident()
        self._added[text] = (self._incarnation(), thread)
        promise = self._promises.get(thread)
        if promise is not None and promise[0] == text:
            del self._promises[thread]
        self._given.pop(text, None)

    def audit(self, but_last_of: int | None = None) -> int:
        """Write what was added to the audit; returns how many tasks.

        Args:
            but_last_of: A thread whose last task did not come to its end; that one is left out.
        """
        texts = list(self._added)
        if but_last_of is not None:
            last = next((text for text in reversed(texts) if self._added[text][1] == but_last_of), None)
            if last is not None:
                texts.remove(last)
                logger.warning('node=%s task=%s was not finished and is not audited', self._node, last)
        if texts:
            with self._sessions.session() as connection:
                tasks.audit(connection, self._tables, self._node, self._date, [(text, self.token_of(text)) for text in texts])
            self._done.update(texts)
            for text in texts:
                self._added.pop(text, None)
        return len(texts)

    def close(self) -> None:
        """Answer False from now on."""
        self._lease = _NO_LEASE

    def release(self) -> None:
        """Delete this node's claims; what was not audited is free."""
        with self._sessions.session() as connection:
            tasks.release_claims(connection, self._tables, self._node, self._incarnation())

    def _holds(self, text: str, now: float) -> bool:
        """Whether this node recorded the task before its token went away: then it still is this node's, and nobody else's."""
        self._promises.pop(get_ident(), None)
        added = self._added.get(text)
        if added is None or added[0] != self._incarnation():
            return False
        return now < self._lease[0] and not (claims.forked and self._claims.is_orphaned())

    def _is_promised(self, text: str) -> bool:
        """Whether this thread was told last that it may take the task, and not too long ago."""
        promise = self._promises.get(get_ident())
        return promise is not None and promise[0] == text and clock.now() - promise[2] <= self._promise_sec

    def _take_back(self, now: float) -> None:
        """Free the tasks that this thread was promised, did not record, and whose tokens went to other nodes."""
        thread = get_ident()
        for text, given in list(self._given.items()):
            given.void = given.void or given.thread == thread
            if now - given.since > self._promise_sec or given.incarnation != self._incarnation():
                self._given.pop(text, None)  # the leader's housekeeping frees the task
            elif given.void and now >= given.retry_at:
                # The hand-over may not be committed yet; so it is taken back only once it is found.
                given.retry_at = now + _RETRY_SEC
                with suppress(JobSyncError), self._sessions.session() as connection:
                    if tasks.release_promise(connection, self._tables, self._node, given.incarnation, self._date, text):
                        self._given.pop(text, None)

    def _taken(self, text: str) -> bool:
        with self._sessions.session() as connection:
            return tasks.is_taken(connection, self._tables, self._node, self._date, text)
