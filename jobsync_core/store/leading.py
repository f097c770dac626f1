"""A leader's round against PostgreSQL: evict the dead; plan if anything changed, and write the
difference only, in pieces (plans.py).
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass

from ..assignment.model import Member
from ..assignment.round import decide
from ..config import CoordinationConfig
from ..logs import get_logger
from ..protocol.messages.leadership import DEATHS, Evict, EvictReply, Lead, ObserveReply, RoundReply
from ..protocol.messages.signs import Sign
from .cluster_transaction import ClusterTransaction, read_members
from .computing import Computation
from .connection import Connection
from .epochs import Epochs
from .options import agent_limits
from .pins import LocksAt, PinReader
from .plans import Draft, Outdated, read_assignment
from .tables import Tables

__all__ = ['LeaderStore', 'Portions']

logger = get_logger(__name__)

#: The part of the heartbeat timeout that a transaction may take: what is left of the lease covers
#: the next heartbeat.
_ROUND = 0.4
#: Expired locks that one round deletes.
_EXPIRED = 20_000


@dataclass(frozen=True)
class _State:
    """What the cluster's row says before the plan; `seen` is the fingerprint of nodes and locks.

    gap: the tokens that have no row though a plan has been made; '' where there are none.
    """

    version: int
    total_tokens: int
    hash_function: str
    lock_version: int
    seen: str
    planned: bool
    gap: str

    @property
    def locks_at(self) -> LocksAt:
        """What the pins depend on."""
        return self.lock_version, self.total_tokens, self.hash_function


@dataclass
class Portions:
    """How much of a round one request carries out: as many rows as it has time for.

    Args:
        patience: Seconds that a request may take.
        rows: Rows of a plan that the next transaction writes.
        fewest, most: Its bounds.
        at_once: Locks and rows with which a plan is computed at once: it takes a few tenths of a
            second. With more it takes a thread.
    """

    patience: float
    rows: int = 5_000
    fewest: int = 200
    most: int = 50_000
    at_once: int = 20_000

    def wrote(self, took: float) -> None:
        """A transaction took so many seconds."""
        if took > self.patience / 4:
            self.rows = max(self.fewest, self.rows // 2)
        elif took < self.patience / 10:
            self.rows = min(self.most, self.rows * 2)

    def failed(self) -> None:
        """A request failed: it may have been too much."""
        self.rows = max(self.fewest, self.rows // 4)


class LeaderStore:
    """Carries out Evict, Lead and Observe.

    Args:
        config: The cluster's settings.
        tables: Names of the tables.
        epochs: Told of the nodes that are evicted.

    Attributes:
        locks: The locks, in memory.
        portions: How much one request carries out.
    """

    def __init__(self, config: CoordinationConfig, tables: Tables, epochs: Epochs) -> None:
        self._epochs = epochs
        self._tables = tables
        self.portions = Portions(agent_limits(config).statement)
        self._most = _ROUND * config.heartbeat_timeout_sec
        self._draft: Draft | None = None
        self._computing: Computation | None = None
        self.locks = PinReader(tables)
        self._timeout = config.heartbeat_timeout_sec
        self._check_every = config.rebalance_check_interval_sec
        self._check_at = 0.0
        # Since when all nodes have been told to look at their rows again, as some are gone: the
        # cluster's version then, the tokens of these rows, and the time.
        self._gap: tuple[int, str, float] | None = None

    def observe(self, connection: Connection) -> ObserveReply | None:
        """All nodes, and what there is to do; None before the first node."""
        # Whether tokens have no row is asked now and then only: it reads all rows.
        pieces = {} if time.monotonic() >= self._check_at else {'gap': "''"}
        rows = connection.execute(self._tables.sql('leader.observe', **pieces))
        if not rows:
            return None
        version, stale, gap, next_expiry, members = rows[0]
        self._checked_gap(gap)
        return ObserveReply(read_members(members), version, stale or bool(gap), next_expiry)

    def _checked_gap(self, gap: str) -> None:
        now = time.monotonic()
        if gap:
            self._check_at = 0.0
        elif now >= self._check_at:
            self._check_at = now + self._check_every

    def lead(self, connection: Connection, request: Lead) -> RoundReply | None:
        """One round, or as much of it as one request may take; None where this incarnation is not
        in the node table.
        """
        began = time.monotonic()
        try:
            while True:
                led = self._step(connection, request, began)
                if (
                    led is None
                    or not led.more
                    or time.monotonic() - began > self.portions.patience / 2
                ):
                    return led
        except BaseException:
            # What is written is written. The next try begins with smaller pieces.
            self._draft = None
            self.portions.failed()
            raise

    def evict(self, connection: Connection, request: Evict) -> EvictReply | None:
        """Delete the dead, in a transaction of its own, so that it stands whatever comes of the
        plan; None as for `lead`.
        """
        with ClusterTransaction(
            connection, self._tables, exclusive=False, seconds=self._most
        ) as steps:
            _, members = self._begin(steps)
            if not any(member.incarnation == request.incarnation for member in members):
                return None
            if not _is_eldest(request, members):
                return EvictReply(False)
            evicted = steps.delete_unlocked(request.targets)
            self._epochs.evicting(steps, request.dead, evicted)
        if evicted:
            self._draft = None  # it counts on their tokens, even if the same life comes back
        self._epochs.evicted(evicted)
        return EvictReply(True, evicted)

    def _begin(self, steps: ClusterTransaction) -> tuple[int, tuple[Member, ...]]:
        """Take the cluster's row; its version, and the nodes, the oldest first."""
        found = steps.run('leader.begin')
        return (found[0][0], read_members(found[0][1])) if found else (0, ())

    def _step(self, connection: Connection, request: Lead, began: float) -> RoundReply | None:
        """One transaction, which writes a piece of the plan; where there is none yet, it is made
        afterwards, without any lock.
        """
        version = 0
        waiting = False
        try:
            with ClusterTransaction(
                connection, self._tables, exclusive=True, seconds=self._most
            ) as steps:
                version, members = self._begin(steps)
                if not any(member.incarnation == request.incarnation for member in members):
                    return None
                if not _is_eldest(request, members):
                    return RoundReply(False, version)
                state = self._prepare(steps)
                waiting = bool(state.gap) and not self._may_fill(state)
                if waiting:
                    version = self._open_gap(steps, state)
                elif state.planned and not state.gap:
                    self._draft = None
                    return RoundReply(True, state.version)
                elif self._draft is not None and self._draft.seen == state.seen:
                    return self._write(steps, request, self._draft, state, began)
        except Outdated:
            self._draft = None
            return RoundReply(True, version, more=True)
        if waiting:
            if version != state.version:
                self._gap = version, state.gap, time.monotonic()
            self._draft = None
            return RoundReply(True, version)
        self._draft = self._plan(connection, began + self.portions.patience / 2)
        return RoundReply(True, state.version, more=True)

    def _may_fill(self, state: _State) -> bool:
        """Whether nobody can hold tokens any more whose rows somebody has deleted.

        Their owner has not been asked to give them up. So all nodes are told to look at their rows,
        and who has not done so within a timeout has lost its lease.
        """
        return (
            self._gap is not None
            and self._gap[:2] == (state.version, state.gap)
            and time.monotonic() - self._gap[2] >= self._timeout
        )

    def _open_gap(self, steps: ClusterTransaction, state: _State) -> int:
        """Tell all nodes, once for the rows that are gone; the version that they look for."""
        if self._gap is not None and self._gap[:2] == (state.version, state.gap):
            return state.version
        version = state.version + 1
        steps.run(
            'leader.open_gap',
            {'version': version, 'channel': self._tables.channel, 'payload': f'plan {version}'},
        )
        logger.warning(
            'tokens have no row in %s, as somebody has deleted some: they get an owner in %g s, '
            'when nobody can hold them '
            'any more',
            self._tables.ring,
            self._timeout,
        )
        return version

    def _prepare(self, steps: ClusterTransaction) -> _State:
        """Delete expired locks, then look whether there is anything to plan."""
        (values,) = steps.run('leader.prepare', {'page': _EXPIRED})
        return _State(*values)

    def _plan(self, connection: Connection, until: float) -> Draft | None:
        """The plan; None where it is not made yet: heartbeats go between, and the next request goes
        on with it.

        Args:
            until: When this request has to end.
        """
        computing = self._computing
        if computing is not None:
            if not computing.wait(until - time.monotonic()):
                return None
            self._computing = None
            draft = computing.result()
            # What it was made from is compared by whoever writes it.
            return draft
        # The fingerprint is of the very moment at which the nodes are read. What is read after it
        # may have changed meanwhile: then no piece is written.
        ((text, groups, *values),) = connection.execute(self._tables.sql('leader.read'))
        state, members = _State(*values), read_members(text)
        ids: dict[str, int] = dict(json.loads(groups or '[]'))
        before = read_assignment(connection, self._tables)
        if not self.locks.read(connection, state.locks_at, until):
            return None
        version, pins = state.version + 1, self.locks.placed(ids)
        names = {number: name for name, number in ids.items()}

        def make() -> Draft:
            return Draft(
                state.seen,
                version,
                before,
                decide(members, before, pins, state.total_tokens, version, names),
                len(members),
            )

        if len(pins) + len(before) <= self.portions.at_once:
            return make()
        self._computing = Computation(state.seen, make)
        return self._plan(connection, until)

    def _write(
        self, steps: ClusterTransaction, request: Lead, draft: Draft, state: _State, began: float
    ) -> RoundReply:
        started = time.monotonic()
        last = draft.write(steps, state.version, self.portions.rows)
        if last:
            self._record(steps, request, draft, state.version + 1, began)
            self._draft = None
        self.portions.wrote(time.monotonic() - started)
        decision = draft.decision
        if not last:
            return RoundReply(True, state.version + 1, more=True)
        return RoundReply(
            True,
            state.version + 1,
            decision.moved + decision.assigned,
            decision.blocked,
            self.locks.complaints(decision.conflicts),
            for_nobody=decision.is_for_nobody,
        )

    def _record(
        self, steps: ClusterTransaction, request: Lead, draft: Draft, version: int, began: float
    ) -> None:
        decision = draft.decision
        steps.run(
            'leader.record',
            {
                'reason': request.reason,
                'leader': request.name,
                'nodes': draft.nodes,
                'moved': decision.moved + decision.assigned,
                'evicted': request.reason == DEATHS,
                'duration': round((time.monotonic() - began) * 1000),
                'channel': self._tables.channel,
                'payload': f'plan {version}',
            },
        )


def _is_eldest(request: Lead | Evict, members: Sequence[Member]) -> bool:
    living = [
        member
        for member in members
        if Sign(member.name, member.incarnation, member.beat) not in request.dead
    ]
    return bool(living) and living[0].incarnation == request.incarnation
