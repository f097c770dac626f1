"""Each fence of the queue groups, and of the rows of their tokens, is switched off in turn."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import replace
from typing import Any

import pytest

from jobsync_core.assignment import round as round_module
from jobsync_core.assignment.groups import PLAIN
from jobsync_core.assignment.model import Member, Segment
from jobsync_core.assignment.tokens import TokenSet
from jobsync_core.protocol import handover
from jobsync_core.protocol.enrollment import Enrollment
from jobsync_core.protocol.handover import HandOver
from jobsync_core.protocol.messages import Reply, Request
from jobsync_core.protocol.messages.handover import Give, GiveReply, RefreshReply
from jobsync_core.protocol.messages.leadership import Lead
from jobsync_core.protocol.node import Protocol

from .drafts import Draft
from .mutation import Mutation
from .store import SimStore


def _plan_for_everybody(patch: pytest.MonkeyPatch) -> None:
    original = round_module._weights

    def mutated(members: Sequence[Member], activate: tuple[str, ...]) -> Any:
        groups = tuple(sorted({group for member in members for group in member.groups}))
        return original([replace(member, groups=groups) for member in members], activate)

    patch.setattr(round_module, '_weights', mutated)


def _rows_only_for_members(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(round_module, '_has_rows', lambda group, rows, live: group == PLAIN)


def _show_old_leaders_all_rows(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(SimStore, 'out_of_sight', lambda self, rows: [])


def _enter_with_plans_of_groups_alone(patch: pytest.MonkeyPatch) -> None:
    original = SimStore.fingerprint
    patch.setattr(SimStore, 'fingerprint', lambda self, of_groups=True: original(self))


def _write_whatever_the_rows(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Draft, 'are_as_read', staticmethod(lambda gone, rows: True))
    patch.setattr(SimStore, 'check_exclusion', lambda self, segments: None)


def _write_plans_of_other_nodes(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(SimStore, 'still_counts', lambda self, draft: True)


def _every_group_is_formed(patch: pytest.MonkeyPatch) -> None:
    original = SimStore.missing

    def mutated(self: SimStore) -> TokenSet:
        formed, self.formed = self.formed, frozenset(self.groups.values())
        missing = original(self)
        self.formed = formed
        return missing

    patch.setattr(SimStore, 'missing', mutated)


def _fill_gaps_at_once(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(SimStore, 'may_fill', lambda self, request, missing: True)


def _look_away_from_later_gaps(patch: pytest.MonkeyPatch) -> None:
    original = SimStore.may_fill

    def mutated(self: SimStore, request: Lead, missing: TokenSet) -> bool:
        told = self.gaps.get(request.incarnation)
        if told is not None and told[0] == self.version:
            self.gaps[request.incarnation] = told[0], missing, told[2]
        return original(self, request, missing)

    patch.setattr(SimStore, 'may_fill', mutated)


def _lease_before_the_rows_of_its_version(patch: pytest.MonkeyPatch) -> None:
    original = HandOver.beat_answered

    def mutated(self: HandOver, version: int, now: float) -> None:
        if version != self.version:
            self.refresh_at = now
        else:
            original(self, version, now)

    patch.setattr(HandOver, 'beat_answered', mutated)


def _plan_without_looking_at_groups(patch: pytest.MonkeyPatch) -> None:
    original = SimStore.fingerprint

    def mutated(self: SimStore, **how: bool) -> Any:
        nodes, locks = original(self, **how)
        return tuple((*node[:4], ()) for node in nodes), locks

    patch.setattr(SimStore, 'fingerprint', mutated)


def _forget_groups_with_the_life(patch: pytest.MonkeyPatch) -> None:
    original = Enrollment.evicted

    def mutated(self: Enrollment) -> None:
        self.wanted = ()
        original(self)

    patch.setattr(Enrollment, 'evicted', mutated)


def _trust_what_was_told_once(patch: pytest.MonkeyPatch) -> None:
    original = Enrollment.refreshed

    def mutated(self: Enrollment, reply: RefreshReply) -> None:
        original(self, replace(reply, groups=self._told))

    patch.setattr(Enrollment, 'refreshed', mutated)
    _believe_that_the_row_stays(patch)


def _believe_that_the_row_stays(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Enrollment, 'heard', lambda self, reply: None)


def _keep_the_first_ids(patch: pytest.MonkeyPatch) -> None:
    original = Enrollment._learn

    def mutated(self: Enrollment, ids: Any) -> None:
        original(self, tuple({**dict(ids), **self.ids}.items()))

    patch.setattr(Enrollment, '_learn', mutated)


def _claim_in_every_group(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Enrollment, 'tokens', property(lambda self: TokenSet([(0, 2**31 - 1)])))


def _give_ids_away_at_once(patch: pytest.MonkeyPatch) -> None:
    def mutated(self: SimStore, wanted: Set[str]) -> list[str]:
        named = {*wanted}.union(*(row.groups for row in self.nodes.values()))
        return [name for name, number in self.groups.items() if number and name not in named]

    patch.setattr(SimStore, 'unneeded', mutated)


def _look_at_no_rows_after_a_wish(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Protocol, 'enroll', lambda self, groups, now: self._parts.enrollment.want(groups))


def _stop_consuming_at_once(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Protocol, 'holds', lambda self, group: group in self._parts.enrollment.wanted)


def _leave_a_group_without_giving(patch: pytest.MonkeyPatch) -> None:
    original = HandOver._follow_moves
    patch.setattr(
        HandOver,
        '_follow_moves',
        lambda self, moving, now: original(self, moving & self._plain, now),
    )


def _give_before_shrinking_in_groups(patch: pytest.MonkeyPatch) -> None:
    original, shrink = Protocol.reply, HandOver._shrink

    def mutated(self: Protocol, request: Request, reply: Reply, now: float) -> None:
        original(self, request, reply, now)
        if isinstance(request, Give) and isinstance(reply, GiveReply):
            self.ownership.replace(self.ownership.tokens - TokenSet(request.ranges))

    patch.setattr(
        HandOver,
        '_shrink',
        lambda self, kept: shrink(self, kept | self._ownership.tokens - self._plain),
    )
    patch.setattr(Protocol, 'reply', mutated)


def _give_what_is_in_use(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        handover._Outgoing, 'free', property(lambda self: self.tokens if self.ready else TokenSet())
    )


def _leave_while_work_goes_on(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(handover._Outgoing, 'released', property(lambda self: self.ready))


def _give_whole_rows(patch: pytest.MonkeyPatch) -> None:
    def mutated(self: SimStore, segment: Segment, request: Give) -> bool:
        parts = ((max(lo, segment.lo), min(hi, segment.hi)) for lo, hi in request.ranges)
        part = next(((lo, hi) for lo, hi in parts if lo < hi), None)
        whole = part and replace(segment, lo=part[0], hi=part[1])
        return whole is not None and original(self, whole, request)

    original = SimStore._may_give
    patch.setattr(SimStore, '_cut', lambda self, segment, request: [segment])
    patch.setattr(SimStore, '_may_give', mutated)


def _give_no_parts_of_rows(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(SimStore, '_cut', lambda self, segment, request: [segment])


def _lose_what_is_in_use(patch: pytest.MonkeyPatch) -> None:
    original = SimStore._cut

    def mutated(self: SimStore, segment: Segment, request: Give) -> list[Segment]:
        pieces = original(self, segment, request)
        return [piece for piece in pieces if len(pieces) == 1 or self._may_give(piece, request)]

    patch.setattr(SimStore, '_cut', mutated)


MUTATIONS = (
    Mutation('what is in use is not given', ('rolling',), _give_what_is_in_use, ('on_release',)),
    Mutation(
        'who leaves waits for what is in use',
        ('rolling',),
        _leave_while_work_goes_on,
        ('on_release',),
    ),
    Mutation(
        'of a row the part is given that is asked for',
        ('rolling', 'enrolling'),
        _give_whole_rows,
        ('hand-over',),
    ),
    Mutation(
        'a part of a row can be given',
        ('rolling', 'enrolling'),
        _give_no_parts_of_rows,
        ('I3', 'no-spin'),
    ),
    Mutation(
        'what is not given of a row stays',
        ('rolling', 'enrolling'),
        _lose_what_is_in_use,
        ('I1', 'I3', 'hand-over'),
    ),
    Mutation('only members take part in a group', ('enrolling',), _plan_for_everybody, ('groups',)),
    Mutation(
        'rows of a group stay while somebody owns tokens',
        ('deserted',),
        _rows_only_for_members,
        ('I1',),
    ),
    Mutation(
        'an old leader does not see the rows of groups',
        ('upgrades',),
        _show_old_leaders_all_rows,
        ('I1',),
    ),
    Mutation(
        'the plan of an old leader is enough to enter',
        ('upgrades',),
        _enter_with_plans_of_groups_alone,
        ('entering',),
    ),
    Mutation(
        'a piece of a plan replaces rows that are as they were read',
        ('enrolling',),
        _write_whatever_the_rows,
        ('I1', 'I3', 'I4'),
    ),
    Mutation(
        'a piece of a plan is written for the nodes that it was made for',
        ('enrolling',),
        _write_plans_of_other_nodes,
        ('I1', 'I3', 'I4', 'groups'),
    ),
    Mutation('a new group waits for nobody', ('single',), _every_group_is_formed, ('I3', 'I4')),
    Mutation(
        'tokens without a row wait until nobody can hold them',
        ('erased',),
        _fill_gaps_at_once,
        ('I1',),
    ),
    Mutation(
        'rows that are deleted later are waited for as well',
        ('erased',),
        _look_away_from_later_gaps,
        ('I1',),
    ),
    Mutation(
        'a lease counts with the rows of its version',
        ('erased',),
        _lease_before_the_rows_of_its_version,
        ('I1',),
    ),
    Mutation(
        'a change of groups makes a plan',
        ('single', 'enrolling'),
        _plan_without_looking_at_groups,
        ('I3',),
    ),
    Mutation(
        'groups outlive an eviction', ('enrolling', 'pauses'), _forget_groups_with_the_life, ('I3',)
    ),
    Mutation(
        'the row is asked which groups it names', ('forgotten',), _trust_what_was_told_once, ('I3',)
    ),
    Mutation(
        'a heartbeat tells which groups the row names',
        ('belated',),
        _believe_that_the_row_stays,
        ('I3', 'I7'),
        schedules=800,
    ),
    Mutation(
        "a group's id is told with the rows",
        ('forgotten',),
        _keep_the_first_ids,
        ('I1', 'I3', 'groups'),
    ),
    Mutation(
        'an id is free when nothing is left of its group',
        ('renamed',),
        _give_ids_away_at_once,
        ('I1', 'I3', 'groups'),
    ),
    Mutation(
        'a group that was wanted for a moment is not held for ever',
        ('renamed',),
        _look_at_no_rows_after_a_wish,
        ('I3',),
    ),
    Mutation(
        'membership before claiming', ('forgotten', 'enrolling'), _claim_in_every_group, ('groups',)
    ),
    Mutation(
        'a queue is consumed until its tokens are given',
        ('enrolling',),
        _stop_consuming_at_once,
        ('groups',),
    ),
    Mutation(
        'who leaves a group gives its tokens',
        ('enrolling', 'deserted'),
        _leave_a_group_without_giving,
        ('I3',),
    ),
    Mutation(
        'shrink before hand-over in groups',
        ('enrolling', 'deserted'),
        _give_before_shrinking_in_groups,
        ('I1',),
    ),
)


@pytest.mark.timeout(120)
@pytest.mark.parametrize('mutation', MUTATIONS, ids=lambda mutation: mutation.fence)
def test_without_the_fence_an_invariant_breaks(
    mutation: Mutation, monkeypatch: pytest.MonkeyPatch
) -> None:
    mutation.must_be_noticed(monkeypatch)
