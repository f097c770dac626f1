"""Each fence is switched off in turn; the simulation must then find a schedule that breaks an
invariant.

A fence that nothing notices would be either superfluous or untested.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from jobsync_core.assignment.model import Segment
from jobsync_core.assignment.tokens import TokenSet
from jobsync_core.protocol import handover, liveness, membership
from jobsync_core.protocol.agenda import NEVER, Due
from jobsync_core.protocol.answers import Answers
from jobsync_core.protocol.connection import Connection, History
from jobsync_core.protocol.handover import HandOver
from jobsync_core.protocol.leadership import Leadership
from jobsync_core.protocol.messages import Reply, Request
from jobsync_core.protocol.messages.handover import Give, GiveReply, RefreshReply, TakeReply
from jobsync_core.protocol.messages.leadership import Evict, EvictReply, Lead
from jobsync_core.protocol.messages.membership import Beat, HeartbeatReply, Join
from jobsync_core.protocol.messages.signs import Life
from jobsync_core.protocol.node import Phase, Protocol
from jobsync_core.protocol.parts import Parts
from jobsync_core.protocol.taken_tasks import TakenTasks

from . import node, scenarios
from .mutation import Mutation
from .node import SimNode, SimOwnership
from .store import SimStore
from .world import World


def _without_lease_deadline(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(SimOwnership, 'answers', lambda self, now: self.mask)
    patch.setattr(SimOwnership, 'may_claim', lambda self, token, now: bool(self.mask >> token & 1))


def _without_lease_margin(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(scenarios, 'LEASE_FRACTION', 1.1)
    patch.setattr(node, 'LEASE_FRACTION', 1.1)


def _lease_from_the_answer(patch: pytest.MonkeyPatch) -> None:
    original = Answers.take

    def mutated(self: Answers, request: Request, reply: Reply, sent_at: float, now: float) -> None:
        original(self, request, reply, now if isinstance(reply, HeartbeatReply) else sent_at, now)

    patch.setattr(Answers, 'take', mutated)


def _give_before_shrinking(patch: pytest.MonkeyPatch) -> None:
    original = Protocol.reply

    def mutated(self: Protocol, request: Request, reply: Reply, now: float) -> None:
        original(self, request, reply, now)
        if isinstance(request, Give) and isinstance(reply, GiveReply):
            self.ownership.replace(self.ownership.tokens - TokenSet(request.ranges))

    patch.setattr(HandOver, '_shrink', lambda self, kept: None)
    patch.setattr(Protocol, 'reply', mutated)


def _refresh_by_name_alone(patch: pytest.MonkeyPatch) -> None:
    original, agenda = SimStore.refresh, Parts.agenda

    def mutated(self: SimStore, request: Any) -> Reply:
        row = self.nodes.get(request.name)
        return original(
            self, replace(request, incarnation=row.incarnation) if row is not None else request
        )

    def without_heartbeat(self: Parts, now: float) -> Iterator[Due]:
        """A heartbeat that goes first hides it: it would hear of the eviction."""
        due = self.membership.beat_at
        if self.handover.must_refresh and self.membership.phase is Phase.ACTIVE:
            self.membership.beat_at = NEVER
        dues = list(agenda(self, now))
        self.membership.beat_at = due
        return iter(dues)

    patch.setattr(SimStore, 'refresh', mutated)
    patch.setattr(Parts, 'agenda', without_heartbeat)


def _beat_by_name_alone(patch: pytest.MonkeyPatch) -> None:
    original = SimStore.beat

    def mutated(self: SimStore, request: Any) -> Reply:
        row = self.nodes.get(request.name)
        return original(
            self, replace(request, incarnation=row.incarnation) if row is not None else request
        )

    patch.setattr(SimStore, 'beat', mutated)


def _claim_without_refresh(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        HandOver,
        'must_refresh',
        property(lambda self: False, lambda self, value: None),
        raising=False,
    )


def _evict_without_looking_again(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(SimStore, 'is_dead', lambda self, sign: sign.name in self.nodes)
    patch.setattr(SimStore, 'is_eldest', lambda self, row, dead: True)


def _no_grace_after_outage(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(liveness.Liveness, '_missed', lambda self, watch, now: False)


def _short_timeout(patch: pytest.MonkeyPatch) -> None:
    original = liveness.Liveness.__init__
    patch.setattr(
        liveness.Liveness,
        '__init__',
        lambda self, timeout, max_gap: original(self, 0.8 * timeout, max_gap),
    )


def _no_exclusion_constraint(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(SimStore, 'check_exclusion', lambda self, segments: None)


def _give_whatever_the_version(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(SimStore, 'version_fits', lambda self, segment, request: True)


def _rejoin_with_old_tokens(patch: pytest.MonkeyPatch) -> None:
    original = Parts.evicted

    def mutated(self: Parts, now: float) -> None:
        tokens = self.ownership.tokens
        original(self, now)
        self.ownership.replace(tokens)

    patch.setattr(Parts, 'evicted', mutated)


def _no_quarantine(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Parts, 'wait_for_old_leases', lambda self, now: None)
    _without_the_check_of_quarantine(patch)


def _without_the_check_of_quarantine(patch: pytest.MonkeyPatch) -> None:
    """The rule is broken, and nobody asks about the rule: what comes of it?"""
    patch.setattr(SimNode, '_note_history', lambda self, reply, origin: None)


def _history_is_not_in_the_heartbeat(patch: pytest.MonkeyPatch) -> None:
    original = Connection.heard

    def mutated(self: Connection, reply: HeartbeatReply) -> History:
        return original(self, replace(reply, history='', settled=True, same=True))

    patch.setattr(Connection, 'heard', mutated)
    patch.setattr(Connection, 'is_of_another_history', lambda self, reply: False)


def _history_only_of_the_connection(patch: pytest.MonkeyPatch) -> None:
    _history_is_not_in_the_heartbeat(patch)
    _without_the_check_of_quarantine(patch)


def _new_nodes_trust_the_server(patch: pytest.MonkeyPatch) -> None:
    original = Connection.heard

    def mutated(self: Connection, reply: HeartbeatReply) -> History:
        self._waits = self._waits or not self.history
        return original(self, reply)

    patch.setattr(Connection, 'heard', mutated)


def _trust_a_known_name(patch: pytest.MonkeyPatch) -> None:
    """Two promotions may share a name: what a node has heard under it is then of the other one."""
    patch.setattr(SimStore, 'continues', staticmethod(lambda row, request: True))
    _without_the_check_of_quarantine(patch)


def _forget_a_break_that_nobody_heard_of(patch: pytest.MonkeyPatch) -> None:
    """A heartbeat whose answer is lost leaves its number where the last one that was answered never
    was.
    """
    patch.setattr(
        SimStore, 'continues', staticmethod(lambda row, request: row.beat >= request.seen)
    )


def _trust_a_row_that_names_no_history(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(SimStore, 'is_first', property(lambda self: True))


def _record_for_another_database(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(SimStore, 'holds', lambda self, request: True)


def _read_the_rows_of_another_history(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Connection, 'is_of_another_history', lambda self, reply: False)
    _without_the_check_of_quarantine(patch)


def _have_waited_in_an_earlier_life(patch: pytest.MonkeyPatch) -> None:
    original = Connection.begin_life

    def mutated(self: Connection) -> None:
        waits = self._waits
        original(self)
        self._waits = waits

    patch.setattr(Connection, 'begin_life', mutated)


def _trust_the_row_after_a_change(patch: pytest.MonkeyPatch) -> None:
    original = Connection.heard

    def mutated(self: Connection, reply: HeartbeatReply) -> History:
        if reply.settled:
            self.history = ''
            self._waits = True
            reply = replace(reply, same=True)
        return original(self, reply)

    patch.setattr(Connection, 'heard', mutated)


def _record_the_history_at_once(patch: pytest.MonkeyPatch) -> None:
    original = SimStore.handle

    def mutated(self: SimStore, request: Request) -> Reply:
        reply = original(self, request)
        if isinstance(request, (Join, Beat)):
            self.recorded = self.server
        return reply

    patch.setattr(SimStore, 'handle', mutated)
    _without_the_check_of_quarantine(patch)


def _take_and_give_in_quarantine(patch: pytest.MonkeyPatch) -> None:
    agenda = Parts.agenda

    def mutated(self: Parts, now: float) -> Iterator[Due]:
        connection = self.connection
        until, connection.quarantine_until = connection.quarantine_until, NEVER
        dues = list(agenda(self, now))
        connection.quarantine_until = until
        return iter(dues)

    patch.setattr(Parts, 'agenda', mutated)
    patch.setattr(Connection, 'is_of_another_history', lambda self, reply: False)


def _extend_the_lease_in_quarantine(patch: pytest.MonkeyPatch) -> None:
    original = Answers.take

    def mutated(self: Answers, request: Request, reply: Reply, sent_at: float, now: float) -> None:
        original(self, request, reply, sent_at, now)
        if isinstance(reply, HeartbeatReply) and self.parts.connection.quarantined:
            self.parts.ownership.extend(sent_at + self.settings.lease)

    patch.setattr(Answers, 'take', mutated)


def _plan_and_evict_in_one(patch: pytest.MonkeyPatch) -> None:
    """As it was: where the plan fails, the eviction fails with it."""
    original = World.execute

    def mutated(self: World, node: SimNode, request: Request, *rest: Any) -> None:
        refused = dict(self.refused)
        self.refused = {
            name: (*kinds, Evict) if Lead in kinds else kinds for name, kinds in refused.items()
        }
        original(self, node, request, *rest)
        self.refused = refused

    patch.setattr(World, 'execute', mutated)


def _nobody_steps_down(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        Leadership,
        '_must_step_down',
        property(lambda self: False, lambda self, value: None),
        raising=False,
    )


def _beat_at_any_time(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(membership, 'beat_delay', lambda ages, interval: interval)


def _all_of_the_oldest_look(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Leadership, 'watches', lambda self, now: self.rank(now) is not None)


def _replace_the_living(patch: pytest.MonkeyPatch) -> None:
    original = SimStore.join

    def mutated(self: SimStore, request: Join) -> Reply:
        row = self.nodes.get(request.name)
        return original(
            self,
            replace(request, replace=(row.incarnation, row.beat)) if row is not None else request,
        )

    patch.setattr(SimStore, 'join', mutated)


def _anybody_is_known_dead(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(SimNode, '_is_known_dead', lambda self, process: True)


def _activate_without_asking(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(SimStore, 'take', lambda self, request: TakeReply(request.ranges))


def _activate_all_after_the_first_piece(patch: pytest.MonkeyPatch) -> None:
    original = TakenTasks.taken

    def mutated(self: TakenTasks, *answer: Any) -> TokenSet:
        gain = self.gain
        original(self, *answer)
        self.gain = TokenSet()
        return gain

    patch.setattr(TakenTasks, 'taken', mutated)


def _hand_over_without_promises(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(SimNode, '_promises', lambda self, tokens: ())


def _no_wait_for_release(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        handover._Outgoing,
        'ready',
        property(lambda self: True, lambda self, value: None),
        raising=False,
    )


def _take_from_the_living(patch: pytest.MonkeyPatch) -> None:
    original = SimStore.write

    def mutated(self: SimStore, segments: Any) -> None:
        original(
            self,
            [
                replace(s, node=s.moving_to, moving=False, moving_to=None)
                if s.moving and s.moving_to
                else s
                for s in segments
            ],
        )

    patch.setattr(SimStore, 'write', mutated)


def _plan_on_a_stale_look(patch: pytest.MonkeyPatch) -> None:
    """The leader reads the rows at its last look and writes at its round: what the advisory lock
    prevents.
    """
    observe, plan = SimStore.observe, SimStore.plan
    seen: dict[int, list[Segment]] = {}

    def mutated_observe(self: SimStore) -> Reply:
        seen[id(self)] = list(self.segments)
        return observe(self)

    def mutated_plan(self: SimStore) -> Any:
        if id(self) in seen:
            self.segments = [
                s if s.node in self.nodes else replace(s, node=None) for s in seen[id(self)]
            ]
        return plan(self)

    patch.setattr(SimStore, 'observe', mutated_observe)
    patch.setattr(SimStore, 'plan', mutated_plan)


def _plan_though_nothing_changed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        SimStore, 'fingerprint', lambda self, **how: (((str(self.version), '', '', 0.0),), 0)
    )


def _round_after_round(patch: pytest.MonkeyPatch) -> None:
    original = Leadership.evicted

    def mutated(self: Leadership, request: Evict, reply: EvictReply, now: float) -> None:
        original(self, request, reply, now)
        self._must_look = False
        self.look_at = now + self._poll
        self._retries[Evict].reset()

    patch.setattr(Leadership, 'evicted', mutated)


def _give_to_nobody(patch: pytest.MonkeyPatch) -> None:
    original = HandOver.refreshed

    def mutated(
        self: HandOver, reply: RefreshReply, life: Life, claimable: TokenSet, now: float
    ) -> None:
        segments = tuple(
            replace(s, moving_to=life.name) if s.moving and s.moving_to is None else s
            for s in reply.segments
        )
        original(self, replace(reply, segments=segments), life, claimable, now)

    patch.setattr(HandOver, 'refreshed', mutated)


MUTATIONS = (
    Mutation('lease deadline', ('partitions', 'pauses'), _without_lease_deadline, ('I1', 'I2')),
    Mutation('lease margin', ('partitions', 'pauses'), _without_lease_margin, ('I1',)),
    Mutation(
        'lease counted from the sending of the heartbeat',
        ('partitions', 'pauses'),
        _lease_from_the_answer,
        ('I1', 'I2'),
    ),
    Mutation('shrink before hand-over', ('rolling',), _give_before_shrinking, ('I1',)),
    Mutation('incarnation in refresh', ('names',), _refresh_by_name_alone, ('lives',)),
    Mutation('incarnation in heartbeat', ('names',), _beat_by_name_alone, ('I1', 'lives')),
    Mutation(
        'refresh before claiming after reconnect',
        ('restores',),
        _claim_without_refresh,
        ('I1', 'I3'),
    ),
    Mutation("leader's re-check of the dead", ('revivals',), _evict_without_looking_again, ('I1',)),
    Mutation('grace after an outage', ('outages', 'single'), _no_grace_after_outage, ('I4',)),
    Mutation('the whole timeout is waited', ('partitions',), _short_timeout, ('I1',)),
    Mutation('exclusion constraint', ('meddling',), _no_exclusion_constraint, ('I1',)),
    Mutation('version in hand-over', ('flapping',), _give_whatever_the_version, ('I1',)),
    Mutation('clear before rejoining', ('partitions', 'pauses'), _rejoin_with_old_tokens, ('I1',)),
    Mutation('quarantine after failover', ('failovers', 'promotions'), _no_quarantine, ('I1',)),
    Mutation(
        "the database's history is in each heartbeat",
        ('promotions',),
        _history_is_not_in_the_heartbeat,
        ('quarantine',),
    ),
    Mutation(
        'a failover behind a pooler is noticed',
        ('promotions',),
        _history_only_of_the_connection,
        ('I1',),
    ),
    Mutation(
        'a new node waits where the history is new',
        ('promotions',),
        _new_nodes_trust_the_server,
        ('quarantine',),
    ),
    Mutation(
        'a history is recorded after the wait',
        ('promotions',),
        _record_the_history_at_once,
        ('I1',),
    ),
    Mutation(
        'histories of one name are told apart', ('reused',), _trust_a_known_name, ('I1', 'I7')
    ),
    Mutation(
        'a break is one until its node has heard of it',
        ('reused',),
        _forget_a_break_that_nobody_heard_of,
        ('quarantine',),
    ),
    Mutation(
        'a promoted server whose row names no history settles nothing',
        ('reused', 'promotions'),
        _trust_a_row_that_names_no_history,
        ('quarantine',),
    ),
    Mutation(
        'a history is recorded only by who has waited in it',
        ('reused',),
        _record_for_another_database,
        ('quarantine',),
    ),
    Mutation(
        'rows count only in the history of the last heartbeat',
        ('reused', 'promotions'),
        _read_the_rows_of_another_history,
        ('I1',),
    ),
    Mutation(
        'who was evicted has not waited yet',
        ('reused',),
        _have_waited_in_an_earlier_life,
        ('quarantine',),
    ),
    Mutation(
        'a change is waited out, whatever the row says',
        ('failbacks',),
        _trust_the_row_after_a_change,
        ('quarantine',),
    ),
    Mutation(
        'nothing is taken or given in quarantine',
        ('failovers', 'promotions'),
        _take_and_give_in_quarantine,
        ('quarantine',),
    ),
    Mutation(
        'no lease in quarantine',
        ('failovers', 'promotions'),
        _extend_the_lease_in_quarantine,
        ('quarantine',),
    ),
    Mutation(
        'an eviction stands whatever the plan does',
        ('refusals',),
        _plan_and_evict_in_one,
        ('eviction',),
    ),
    Mutation('a leader whose rounds fail steps down', ('refusals',), _nobody_steps_down, ('I3',)),
    Mutation('the oldest beat one after another', ('together',), _beat_at_any_time, ('I3',)),
    Mutation('followers do not look at the table', ('rolling',), _all_of_the_oldest_look, ('I7',)),
    Mutation('a name is taken over only from the dead', ('names',), _replace_the_living, ('I1',)),
    Mutation('known dead means dead', ('names',), _anybody_is_known_dead, ('I1',)),
    Mutation(
        'ask who has taken the tasks before activating',
        ('rolling', 'locks'),
        _activate_without_asking,
        ('tasks',),
    ),
    Mutation(
        'each piece of a gain is active when it is known, and no sooner',
        ('rolling', 'locks'),
        _activate_all_after_the_first_piece,
        ('tasks',),
    ),
    Mutation(
        'promises go with the hand-over',
        ('rolling', 'locks'),
        _hand_over_without_promises,
        ('tasks',),
    ),
    Mutation(
        'on_release comes before the hand-over', ('rolling',), _no_wait_for_release, ('on_release',)
    ),
    Mutation('nobody takes tokens from a live owner', ('rolling',), _take_from_the_living, ('I1',)),
    Mutation(
        'the leader reads and writes in one transaction',
        ('rolling', 'flapping'),
        _plan_on_a_stale_look,
        ('I1',),
    ),
    Mutation(
        'no plan when nothing changed', ('single',), _plan_though_nothing_changed, ('I4', 'I3')
    ),
    Mutation(
        'a round that evicted nobody is not repeated blindly',
        ('revivals', 'names'),
        _round_after_round,
        ('no-spin',),
    ),
    Mutation(
        'tokens without a receiver wait for the next plan',
        ('headless',),
        _give_to_nobody,
        ('no-spin',),
    ),
)


@pytest.mark.timeout(120)
@pytest.mark.parametrize('mutation', MUTATIONS, ids=lambda mutation: mutation.fence)
def test_without_the_fence_an_invariant_breaks(
    mutation: Mutation, monkeypatch: pytest.MonkeyPatch
) -> None:
    mutation.must_be_noticed(monkeypatch)
