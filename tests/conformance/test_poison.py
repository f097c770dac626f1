"""A task that ends its process is attempted so often as it may be, and then no more; all else goes
on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import pytest

from jobsync_core.executions import ExecutionFilter, Executions
from tests.support.waiting import eventually

from .harness import Cluster, Outcome
from .setups import Setup, setups

T = TypeVar('T')
MakeCluster = Callable[..., Cluster]

#: As the app of each framework says.
_MOST = {'celery': 3, 'dramatiq': 2}


def _until(cluster: Cluster, condition: Callable[[], T]) -> T:
    """Wait until a condition is true. Whenever the worker has ended, it is started again, as by
    whoever supervises it: Dramatiq's other processes end with one that dies.
    """

    def holds() -> T:
        if not cluster['worker-1'].is_running():
            cluster['worker-1'].crash()  # what is left of it
            cluster.launch('worker-1')
        return condition()

    return eventually(holds, 90)


def _survive(cluster: Cluster, message: str) -> Outcome:
    """What becomes of a message."""

    def known() -> Outcome | None:
        found = cluster.adapter.outcome(message)
        return None if found.state == 'pending' else found

    found = _until(cluster, known)
    assert found is not None
    return found


@pytest.mark.parametrize('setup', setups(), ids=str)
def test_it_is_attempted_so_often_and_is_a_dead_letter_then(
    setup: Setup, make_cluster: MakeCluster
) -> None:
    cluster, most = make_cluster(setup), _MOST[setup.framework]
    cluster.start('worker-1')
    message = cluster.send('poison', 1, fate='failed')
    others = {f'b:{n}' for n in range(10)}
    for n in range(10):
        cluster.send('body', n, 0.1)
    found = _survive(cluster, message)
    assert found.state == 'failed' and 'AttemptsExhausted' in repr(found.value)
    assert len(cluster.notes.of('start', ['x:1'])) == most
    if setup.framework == 'dramatiq':
        _until(cluster, lambda: cluster.notes.of('end', ['d:poison 1']))

    # a duplicate gets the same, and runs no more
    found = _survive(cluster, cluster.send('poison', 1, fate='failed'))
    assert found.state == 'failed' and 'AttemptsExhausted' in repr(found.value)
    assert len(cluster.notes.of('start', ['x:1'])) == most

    with Executions(cluster.place.config) as executions:
        (dead,) = executions.find(ExecutionFilter(state='dead'))
        assert dead['key'] == 'poison:x:1'
        history = executions.show(dead['key'])['history']
    assert [each['outcome'] for each in history] == ['lost'] * most
    _until(cluster, lambda: {note.key for note in cluster.notes.of('end', others)} == others)
    cluster.finish(60)
