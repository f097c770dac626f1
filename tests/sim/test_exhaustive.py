"""Small scope, all of it: three nodes and two tokens, at most one pause, one crash and one database
outage, or one change of queue groups in place of the outage, at every point of a grid.

The search shares prefixes: it runs to a point, keeps a snapshot of the whole world, and takes each
choice from there.
"""

from __future__ import annotations

import itertools
import pickle
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

import pytest

from jobsync_core.protocol.node import Protocol, Settings

from .invariants import Violation
from .node import LEASE_FRACTION, SimNode
from .schedule import TIMEOUT
from .world import World

_NAMES = ('a', 'b', 'c')
#: Points at which something may happen; `make soak` takes twice as many.
_SLOTS = 4
#: Between two points: no multiple of the heartbeat interval, so that the points meet it in all its
#: phases.
_STEP = TIMEOUT / 3.3
#: A hiccup; longer than the lease and shorter than the timeout; longer than both.
_PAUSES = (TIMEOUT * 0.4, TIMEOUT * 0.96, TIMEOUT * 1.4)
_OUTAGES = (TIMEOUT * 0.2, TIMEOUT * 1.3)
#: Where there are groups: one of the two members leaves, or the third node joins.
_GROUPS = {'a': frozenset('g'), 'b': frozenset('g'), 'c': frozenset[str]()}
_CHANGES = (('b', frozenset[str]()), ('c', frozenset('g')))
_BOUND = 3.5 * TIMEOUT


#: Who is paused for how long, who crashes and whether it comes back, how long the database is gone,
#: and who belongs to which groups from now on.
_Choice: TypeAlias = tuple[
    'tuple[str, float] | None',
    'tuple[str, bool] | None',
    'float | None',
    'tuple[str, frozenset[str]] | None',
]


class _Even:
    """In place of chance: every delay is the mean one."""

    def random(self) -> float:
        return 0.5


@dataclass(frozen=True)
class _Faults:
    """What has not happened yet in this branch, and what has."""

    pause: bool = True
    crash: bool = True
    outage: bool = True
    change: bool = False
    done: tuple[str, ...] = ()


def _no_time() -> float:
    return 0.0


def _start(
    world: World,
    name: str,
    lease: float = LEASE_FRACTION * TIMEOUT,
    groups: frozenset[str] = frozenset(),
) -> None:
    settings = Settings(
        interval=TIMEOUT / 3,
        timeout=TIMEOUT,
        lease=lease,
        check_interval=2 * TIMEOUT,
        release_timeout=1.0,
        total_tokens=2,
        groups=tuple(sorted(groups)),
    )
    # The leader's clock is the fastest, so that it is the first to call somebody dead; the other
    # two are slow.
    rate = 1.01 if name == 'a' else 0.99
    world.add(
        SimNode(world, name, settings, rate=rate, offset=100.0, machine=0, release_times=_no_time)
    )


def _formed(
    lease: float = LEASE_FRACTION * TIMEOUT, groups: Mapping[str, frozenset[str]] | None = None
) -> World:
    world = World(0, 2)
    world.rng = _Even()  # type: ignore[assignment]  # all that the world asks of it
    for name in _NAMES:
        _start(world, name, lease, (groups or {}).get(name, frozenset()))
    world.run(2.5)
    assert world.whole() is None
    return world


def _choices(faults: _Faults) -> list[_Choice]:
    pauses = [None, *itertools.product(_NAMES, _PAUSES)] if faults.pause else [None]
    crashes = [None, *itertools.product(_NAMES, (False, True))] if faults.crash else [None]
    outages = [None, *_OUTAGES] if faults.outage else [None]
    changes = [None, *_CHANGES] if faults.change else [None]
    return [
        (pause, crash, outage, change)
        for pause, crash, outage, change in itertools.product(pauses, crashes, outages, changes)
        if crash is None or pause is None or pause[0] != crash[0]
    ]


def _apply(
    world: World,
    faults: _Faults,
    pause: tuple[str, float] | None,
    crash: tuple[str, bool] | None,
    outage: float | None,
    change: tuple[str, frozenset[str]] | None,
) -> _Faults:
    nodes = {node.name: node for node in world.nodes}
    done = list(faults.done)
    if change is not None and change[0] in nodes:
        nodes[change[0]].enroll(change[1])
        done.append(f'{world.now:.2f} {change[0]} belongs to {sorted(change[1])}')
    if pause is not None and pause[0] in nodes:
        nodes[pause[0]].pause()
        world.at(world.now + pause[1], nodes[pause[0]].resume)
        done.append(f'{world.now:.2f} pause {pause[0]} for {pause[1]:.2f}')
    if crash is not None:
        name, restarts = crash
        nodes[name].crash()
        if restarts:
            lease = nodes[name].settings.lease
            world.at(world.now + 0.3, _start, world, name, lease, nodes[name].wants)
        done.append(f'{world.now:.2f} crash {name}{" and restart" if restarts else ""}')
    if outage is not None:
        world.stop_server()
        world.at(world.now + outage, world.start_server)
        done.append(f'{world.now:.2f} outage for {outage:.2f}')
    return replace(
        faults,
        pause=faults.pause and pause is None,
        crash=faults.crash and crash is None,
        outage=faults.outage and outage is None,
        change=faults.change and change is None,
        done=tuple(done),
    )


def _finish(world: World) -> None:
    """Let the faults end and the cluster become whole (I3)."""
    longest = max(*_PAUSES, *_OUTAGES)
    end = world.now + longest + _BOUND
    while world.now < end:
        world.run(world.now + 0.5)
        if world.up and not any(node.paused for node in world.nodes) and world.whole() is None:
            return
    raise Violation(f'I3: {world.whole()}')


def _explore(world: World, slot: int, faults: _Faults) -> int:
    """All schedules from here on; returns how many."""
    if slot == _SLOTS or not (faults.pause or faults.crash or faults.outage or faults.change):
        try:
            _finish(world)
        except Violation as violation:
            raise Violation(
                f'{violation}; faults: {"; ".join(faults.done) or "none"}'
            ) from violation
        return 1
    choices = _choices(faults)
    snapshot = pickle.dumps(world, pickle.HIGHEST_PROTOCOL)
    count = 0
    for choice in choices:
        branch = pickle.loads(snapshot)
        try:
            left = _apply(branch, faults, *choice)
            branch.run(branch.now + _STEP)
        except Violation as violation:
            raise Violation(f'{violation}; faults: {faults.done}, {choice}') from violation
        count += _explore(branch, slot + 1, left)
    return count


@pytest.mark.timeout(300)
def test_every_schedule_of_the_small_scope() -> None:
    count = _explore(_formed(), 0, _Faults())
    print(f'{count} schedules of one pause, one crash and one outage over three nodes')
    assert count == 7_677


@pytest.mark.timeout(300)
def test_every_schedule_of_the_small_scope_with_a_queue_group() -> None:
    count = _explore(_formed(groups=_GROUPS), 0, _Faults(outage=False, change=True))
    print(f'{count} schedules of one pause, one crash and one change of groups over three nodes')
    assert count == 7_677


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_every_schedule_of_a_longer_scope(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], '_SLOTS', 8)
    count = _explore(_formed(), 0, _Faults())
    print(f'{count} schedules of one pause, one crash and one outage over three nodes')
    assert count == 58_361


def test_the_search_finds_a_lease_that_is_too_long() -> None:
    world = _formed(lease=1.1 * TIMEOUT)
    world.leases_checked = False
    with pytest.raises(Violation, match='I1'):
        _explore(world, 0, _Faults())


def test_the_search_finds_a_queue_that_is_left_too_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Protocol, 'holds', lambda self, group: False)
    with pytest.raises(Violation, match='groups: b#2 claims'):
        _explore(_formed(groups=_GROUPS), 0, _Faults(outage=False, change=True))
