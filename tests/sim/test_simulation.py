"""Seeded schedules of faults: I1 and I2 hold after every step, I3 and I4 once the faults have
ceased.
"""

from __future__ import annotations

import pytest

from .scenarios import FAMILIES, run

#: 2,400 schedules in all; `python -m tests.sim --schedules 1000000` plays more.
_SCHEDULES_PER_FAMILY = 2400 // len(FAMILIES)


@pytest.mark.timeout(300)
@pytest.mark.parametrize('family', sorted(FAMILIES))
def test_invariants_hold_in_every_schedule(family: str) -> None:
    place = sorted(FAMILIES).index(family)
    for number in range(_SCHEDULES_PER_FAMILY):
        run(place + number * len(FAMILIES), family)


def test_a_schedule_replays_exactly() -> None:
    histories = [list(run(seed, 'everything', tracing=100_000).world.history) for seed in (5, 5, 6)]
    assert histories[0] == histories[1]
    assert histories[0] != histories[2]
    assert len(histories[0]) > 500
