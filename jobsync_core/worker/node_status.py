"""What a worker tells of its node: its status, why it pauses, and that it is none."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from .. import clock
from ..job import Job

__all__ = ['node_status', 'refusal', 'tell_uncoordinated']


def tell_uncoordinated(
    log: logging.Logger, reason: str, setting: str, trace: BaseException | None = None
) -> None:
    """Say that a worker is no node, and runs all the same.

    Args:
        log: Where.
        reason: Why it could not enter.
        setting: What the setting is called that lets it run.
        trace: An error that nobody expected.
    """
    log.critical(
        'JobSync: %s -- THIS WORKER RUNS WITHOUT COORDINATION, because %s is False: '
        'keys may run twice',
        reason,
        setting,
        exc_info=trace,
    )


def node_status(job: Job, *, consuming: bool, messages: Mapping[str, int]) -> dict[str, Any]:
    """A node as it sees itself, as plain values.

    Args:
        job: The node.
        consuming: Whether its worker takes messages.
        messages: What became of messages.
    """
    status: dict[str, Any] = dict(job.local_status())
    status['recent_events'] = [
        {**event, 'timestamp': str(event['timestamp'])} for event in status['recent_events']
    ]
    heartbeat = status['last_heartbeat']
    status['last_heartbeat'] = str(heartbeat) if heartbeat is not None else None
    return {
        **status,
        'consuming': consuming,
        'paused': refusal(job, clock.now()),
        'messages': dict(messages),
    }


def refusal(job: Job, now: float) -> str:
    """Why consuming pauses, as the database refuses to begin anything; '' where it does not."""
    return str(job.pausing.error) if job.pausing.is_paused(now) else ''
