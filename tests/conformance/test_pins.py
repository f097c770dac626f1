"""A pin that no live node matches holds up nothing else."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from tests.support.waiting import eventually

from .harness import Cluster
from .setups import Setup, setups

_PINNED, _PLAIN = 200, 20


@pytest.mark.parametrize('setup', setups('threads'), ids=str)
def test_work_behind_a_pin_that_no_node_matches_goes_on(
    setup: Setup, make_cluster: Callable[..., Cluster]
) -> None:
    cluster = make_cluster(setup, pins=['homeless'])
    worker = cluster.launch('alpha', concurrency=4).wait_ready()
    cluster.settle()
    for n in range(_PINNED):
        cluster.send('homeless', n, fate='waiting')
    began = time.monotonic()
    for n in range(_PLAIN):
        cluster.send('plain', n)
    cluster.wait_ended({f'p:{n}' for n in range(_PLAIN)}, 30)
    # Each of the others would have waited for two seconds in one of eight places, or fewer.
    assert time.monotonic() - began < 15
    eventually(lambda: parked(cluster) == _PINNED, 30)
    text = 'matches its pin'
    lines = [line for line in worker.log().splitlines() if text in line]
    assert len(lines) == 1 and 'missing-%' in lines[0]
    # A producer that knows the owners does not trouble a worker with them.
    for n in range(_PINNED, _PINNED + 5):
        cluster.send('homeless', n, fate='waiting', routed=True)
    eventually(lambda: parked(cluster) == _PINNED + 5, 30)
    assert not [note for note in cluster.notes.of('start') if note.key.startswith('g:')]


def parked(cluster: Cluster) -> int:
    """Messages that are parked."""
    return sum(count for queue, count in cluster.left().items() if 'parked' in queue)
