"""Which nodes a pin allows, and what is said of one that none matches."""

from __future__ import annotations

import pytest

from jobsync_core.worker.pinned import Pinned

PINS = {'proj.render': ['gpu-1', '%-gpu']}


@pytest.mark.parametrize(
    ('route', 'node', 'allowed'),
    [
        ('proj.render#3', 'gpu-1@host', True),
        ('proj.render#3', 'x-gpu', True),
        ('proj.render#3', 'cpu-1', False),
        ('proj.other#3', 'cpu-1', True),
        ('proj.render', 'cpu-1', True),
        ('proj.render#x', 'cpu-1', True),
        ('proj.render#63', 'cpu-1', False),
        ('proj.render#64', 'cpu-1', True),
        ('proj.render#07', 'cpu-1', True),
        ('proj.render#\u0663', 'cpu-1', True),
        ('order-1', 'cpu-1', True),
    ],
)
def test_a_pin_holds_for_the_virtual_keys_of_its_task(route: str, node: str, allowed: bool) -> None:
    assert Pinned(PINS.get).allows(route, node) is allowed


def test_it_is_said_once_for_each_pinned_task_and_once_for_all_other_keys(
    caplog: pytest.LogCaptureFixture,
) -> None:
    pinned = Pinned(PINS.get)
    for slot in range(50):
        pinned.tell(f'proj.render#{slot}', 'gpu')
    for number in range(1, 50):  # the only node that consumes the queue drains
        pinned.tell(f'order-{number}', 'gpu')
    first, second = (record.getMessage() for record in caplog.records)
    assert 'queue=gpu task=proj.render:' in first and "'gpu-1', '%-gpu'" in first
    assert 'queue=gpu key=order-1:' in second and 'lock' in second and 'drain' in second
