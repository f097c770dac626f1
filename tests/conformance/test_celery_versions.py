"""What has to work on every Celery with every kombu: a start with the default flags, work, a death,
an end. Short, as CI runs it often.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from .celery_adapter import CeleryAdapter
from .harness import Cluster
from .setups import Setup, setups

_SETUPS = [
    *setups('processes', framework='celery'),
    *setups('threads', 'single', framework='celery', brokers=('redis',)),
]


@pytest.mark.parametrize('setup', _SETUPS, ids=str)
def test_workers_start_with_the_default_flags_work_and_replace_each_other(
    setup: Setup, make_cluster: Callable[..., Cluster]
) -> None:
    cluster = make_cluster(setup)
    adapter = cluster.adapter
    assert isinstance(adapter, CeleryAdapter)
    # One after another, so that the second one meets the first one's answer in mingle.
    cluster.launch('alpha').wait_ready()
    cluster.launch('beta').wait_ready()
    assert 'mingle: sync complete' in cluster['beta'].log()
    cluster.settle()
    for n in range(30):
        cluster.send('keyed' if n % 2 else 'body', n, 0.05, routed=n % 3 == 0)
    adapter.send_group('group', range(5))
    cluster.wait_progress(10)
    assert set(adapter.app.control.inspect(timeout=3).ping()) == {'alpha@test', 'beta@test'}
    cluster['beta'].crash()
    cluster.finish()
    assert 'lacks' not in cluster['alpha'].log()
