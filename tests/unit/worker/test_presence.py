from __future__ import annotations

import pytest

from jobsync_core.errors import ConfigurationError
from jobsync_core.worker.presence import presence_queue
from jobsync_core.worker.routing import QUEUE_BYTES, home_of_queue, node_queue


def test_no_node_has_a_queue_of_such_a_name() -> None:
    name = presence_queue(node_queue('jobs', 'shop_', 'n1'))
    assert home_of_queue(name, 'shop_') == 'jobs'
    with pytest.raises(ConfigurationError, match='something else'):
        node_queue('jobs', 'shop_', 'n1.present')


def test_a_broker_takes_the_name_of_the_longest_queue() -> None:
    assert len(presence_queue('q' * QUEUE_BYTES)) <= 255
