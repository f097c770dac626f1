"""A worker that is cut off from the database alone, for long: what it has begun is its own until it
dies, and comes back then.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.support.proxy import Mode, Proxy
from tests.support.waiting import eventually

from .harness import Cluster
from .setups import Setup, setups


@pytest.mark.parametrize('setup', setups('threads', brokers=('rabbitmq', 'quorum')), ids=str)
def test_what_it_has_begun_outlives_the_deletion_of_queues_of_nodes_that_are_gone(
    setup: Setup, make_cluster: Callable[..., Cluster]
) -> None:
    """RabbitMQ does not tell what is not acknowledged: its queue looks empty and unused."""
    cluster = make_cluster(setup, conf={'task_acks_late': True})
    config = cluster.place.config
    with Proxy(config.host, int(config.port)) as proxy:
        url = f'postgresql://{config.user}:{config.password}@127.0.0.1:{proxy.port}/{config.dbname}'
        cluster.launch('victim', database=url, pause=300)
        cluster.start('alpha', 'beta')
        key = cluster.numbers('victim', 1, task='routed')[0]
        cluster.send('routed', key, routed=True)
        cluster.wait_started({f'r:{key}'})
        proxy.switch(Mode.HOLD)
        eventually(lambda: 'victim' not in cluster.owning(), 20)
        # The queue of one that ends later is deleted not before it was the victim's turn.
        cluster['beta'].crash()
        eventually(
            lambda: (
                'beta'
                not in {cluster.worker_of(node) for node in cluster.ledger.node_queues().values()}
            ),
            60,
        )
        assert not cluster.notes.of('end')
        cluster['victim'].crash()
    cluster.finish()
    assert [cluster.worker_of(note.node) for note in cluster.notes.of('end')] == ['alpha']
    # Then it is deleted like any other.
    eventually(
        lambda: (
            {cluster.worker_of(node) for node in cluster.ledger.node_queues().values()} == {'alpha'}
        ),
        60,
    )
