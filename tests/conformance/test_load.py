"""A mixed load: every key is completed once, on its owner; nothing is missing, and the results are
right.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

import pytest

from .harness import Cluster
from .setups import SOAK, STEADY, Setup, setups

#: Messages of the mixed load, and on one setup of each broker.
_SMALL, _LARGE = 300, 2000
_LARGEST = {setup.broker: setup for setup in setups('processes', framework='dramatiq')}


def send_mixed(cluster: Cluster, seed: int, count: int) -> dict[str, object]:
    """Send about `count` messages of all sorts; the results that are known beforehand, by message
    id.
    """
    chance = random.Random(seed)
    expected: dict[str, object] = {}
    for n in range(count):
        routed, delay = chance.random() < 0.5, {'delay': 0.5} if chance.random() < 0.1 else {}
        kind = chance.choices(
            ['keyed', 'body', 'by_id', 'flaky', 'plain', 'routed', 'sour'],
            [40, 15, 10, 8, 15, 10, 2],
        )[0]
        fate = 'failed' if kind == 'sour' else 'done'
        message = cluster.send(kind, n, fate=fate, routed=routed, **delay)
        if kind in ('by_id', 'plain', 'routed'):
            expected[message] = n
        if kind in ('keyed', 'body') and chance.random() < 0.1:
            cluster.send(kind, n, routed=not routed)
    return expected


def send_workflows(cluster: Cluster, count: int) -> dict[str, object]:
    """Send pipelines and groups; the results of the pipelines, by the id of their last message."""
    expected: dict[str, object] = {}
    for n in range(count):
        expected[cluster.adapter.send_steps(f'steps {n}', [n, 20, 300], routed=n % 2 == 0)] = (
            n + 320
        )
        cluster.adapter.send_group(f'group {n}', [1, 2, 3, 4], routed=n % 2 == 1)
        for key in (*(f'a:group {n}:{member}:{member}' for member in (1, 2, 3, 4)), f'c:group {n}'):
            cluster.expect(key)
    return expected


@pytest.mark.plain
@pytest.mark.parametrize('setup', setups(), ids=str)
def test_a_mixed_load_completes_once_on_its_owners(
    setup: Setup, make_cluster: Callable[..., Cluster]
) -> None:
    cluster = make_cluster(setup, STEADY)
    cluster.start('alpha', 'beta', 'gamma', concurrency=3)
    stable = cluster.stable()
    expected = send_mixed(
        cluster,
        seed=len(setup.name),
        count=(_LARGE if setup == _LARGEST.get(setup.broker) else _SMALL) * SOAK,
    )
    sums = send_workflows(cluster, 12 * SOAK)
    if cluster.adapter.jobsync:
        cluster.finish(60 * SOAK)
        stable.check_owners(least=200)
    else:
        cluster.wait_ended({item.key for item in cluster.sent if item.fate == 'done'}, 60)
    for message, value in sums.items():
        assert cluster.result(message) == value
    ends = Counter(note.key for note in cluster.ended() if note.key.startswith(('a:', 'c:')))
    if cluster.adapter.jobsync:
        assert len(ends) == ends.total() == 12 * SOAK * 8
    for item in cluster.sent:
        if not item.id:
            continue
        outcome = cluster.outcome(item.id)
        assert outcome.state == item.fate, f'{item}: {outcome}'
        if item.id in expected:
            assert outcome.value == expected[item.id]
        elif item.key.startswith(('k:', 'b:')):
            assert outcome.value['n'] == int(item.key[2:])
            # Of several messages with one key, one ran; the others have its result.
            if cluster.adapter.jobsync:
                assert outcome.value['message'] in {
                    other.id for other in cluster.sent if other.key == item.key
                }
    values = [
        str(cluster.outcome(item.id).value) for item in cluster.sent if item.key.startswith('k:')
    ]
    if cluster.adapter.jobsync:
        assert len(set(values)) == len(
            {item.key for item in cluster.sent if item.key.startswith('k:')}
        )
