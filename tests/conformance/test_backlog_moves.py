"""A worker that is busy for long, and a backlog for it: workers that join have work at once."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.support.waiting import eventually

from .harness import Cluster
from .setups import Setup, setups

#: Seconds for which the busy worker is; messages behind that; and how many of them two that join
#: have done by then at least.
_BUSY_SEC, _KEYS, _MOVED = 90.0, 24, 10


@pytest.mark.parametrize(
    'setup', [*setups('threads'), *setups('processes', framework='celery')], ids=str
)
def test_workers_that_join_a_busy_one_run_what_is_theirs_before_it_is_done(
    setup: Setup, make_cluster: Callable[..., Cluster]
) -> None:
    cluster = make_cluster(setup)
    cluster.start('alpha')
    slots = 2
    busy = [f'k:{n}' for n in range(100, 100 + 3 * slots)]
    for key in busy:
        cluster.send('keyed', int(key[2:]), _BUSY_SEC, routed=True)
    eventually(lambda: len(cluster.notes.of('start', busy)) >= slots, 30)
    for n in range(_KEYS):
        cluster.send('keyed', n, routed=True)
    cluster.start('beta', 'gamma', settle=False, concurrency=8)
    keys = [f'k:{n}' for n in range(_KEYS)]
    eventually(lambda: len(cluster.ended(*keys)) >= _MOVED)
    ran = {cluster.worker_of(note.node) for note in cluster.ended(*keys)}
    assert ran == {'beta', 'gamma'} and not cluster.ended(*busy)
