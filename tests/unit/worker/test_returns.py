from __future__ import annotations

from typing import Any

import pytest

from jobsync_core.worker.returns import (
    earlier_returns,
    has_returned_too_often,
    limit_of,
    returns_of,
)


@pytest.mark.parametrize(
    ('arguments', 'version', 'limit'),
    [
        ({}, '4.0.5', None),
        ({'x-queue-type': 'classic', 'x-delivery-limit': 2}, '4.0.5', None),
        ({'x-queue-type': 'quorum'}, '4.0.5', 20),
        ({'x-queue-type': 'quorum'}, '10.1', 20),
        ({'x-queue-type': 'quorum'}, '3.13.7', None),
        ({'x-queue-type': 'quorum'}, None, None),
        ({'x-queue-type': 'quorum', 'x-delivery-limit': 2}, '3.10.8', 2),
        ({'x-queue-type': 'quorum', 'x-delivery-limit': -1}, '4.0.5', None),
    ],
)
def test_the_limit_is_the_one_that_is_known(
    arguments: dict[str, Any], version: object, limit: int | None
) -> None:
    assert limit_of(arguments, version) == limit


@pytest.mark.parametrize(
    ('headers', 'earlier', 'both'),
    [
        (None, 0, 0),
        ({'x-delivery-count': 0}, 0, 0),
        ({'x-delivery-count': 2}, 0, 2),
        ({'x-delivery-count': 2, 'jobsync_returns': 3}, 3, 5),
        ({'x-delivery-count': 'many', 'jobsync_returns': -3}, 0, 0),
        ({'jobsync_returns': 10**12}, 1000, 1000),
        # somebody has sent a dead letter again
        ({'x-delivery-count': 1, 'jobsync_returns': 3, 'x-death': [{}]}, 0, 1),
    ],
)
def test_the_count_goes_on_from_queue_to_queue(headers: Any, earlier: int, both: int) -> None:
    assert (earlier_returns(headers), returns_of(headers)) == (earlier, both)


def test_what_was_never_passed_on_is_left_to_its_queue() -> None:
    assert not has_returned_too_often({'x-delivery-count': 9}, 2)
    passed = {'x-delivery-count': 1, 'jobsync_returns': 1}
    assert not has_returned_too_often(passed, 2) and not has_returned_too_often(passed, None)
    assert has_returned_too_often({**passed, 'x-delivery-count': 2}, 2)
