"""What RabbitMQ says of messages that were kept for too long."""

from __future__ import annotations

import pytest
from amqp.exceptions import PreconditionFailed, RecoverableConnectionError

from jobsync_celery.outlasted import survive
from jobsync_core.worker.consumer_timeout import is_heeded, is_timeout

_CLOSED = 'PRECONDITION_FAILED - delivery acknowledgement on channel 1 timed out. Timeout value …'
_OTHER = "PRECONDITION_FAILED - inequivalent arg 'x-max-priority' for queue 'celery' in vhost '/'"


@pytest.mark.parametrize(
    ('version', 'heeded'),
    [
        ('3.8.9', False),
        ('3.10.8', False),
        ('3.11.28', False),
        ('3.12.0', True),
        ('3.13.7+1', True),
        ('4.0.5', True),
        ('4.3.0-rc.1', True),
        ('10.1', True),
        ('odd', True),
        (None, True),
    ],
)
def test_from_which_version_on_a_queue_has_a_limit_of_its_own(version: str, heeded: bool) -> None:
    assert is_heeded(version) is heeded


def test_which_answers_mean_it() -> None:
    assert is_timeout(406, _CLOSED)
    assert is_timeout(406, 'PRECONDITION_FAILED - consumer ack timed out on channel 1')
    assert not is_timeout(406, _OTHER)
    assert not is_timeout(406, 'PRECONDITION_FAILED - unknown delivery tag 1')
    assert not is_timeout(541, _CLOSED)


def test_a_loop_of_celery_ends_as_by_a_lost_connection_for_this_answer_alone() -> None:
    def loop(error: Exception) -> None:
        raise error

    with pytest.raises(RecoverableConnectionError):
        survive(loop)(PreconditionFailed(_CLOSED, (0, 0)))
    with pytest.raises(PreconditionFailed):
        survive(loop)(PreconditionFailed(_OTHER, (50, 10)))
    assert survive(lambda *args: args)(1, 2) == (1, 2)
