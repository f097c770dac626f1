"""What a node's connections to Redis leave for the next one when they break."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from kombu.utils.json import loads

from jobsync_core.logs import shown

__all__ = ['CarriedOver']


@dataclass
class CarriedOver:
    """What a node's connections to Redis leave for the next one when they break.

    Args:
        unrecorded: Messages that arrived and are not recorded as unacknowledged yet: delivery tag
            -> the record.
        acknowledged: Delivery tags of messages whose acknowledgement is not confirmed yet.
        asked_at: Since when an answer of Redis has been due, by JobSync's clock; None: none is.
        cut: Breaks the connections of the channel that waits for messages, so that the consumer
            makes others.
    """

    unrecorded: dict[str, str] = field(default_factory=dict)
    acknowledged: set[str] = field(default_factory=set)
    asked_at: float | None = None
    cut: Callable[[], object] = lambda: None

    def ids(self) -> list[str]:
        """The ids of the messages that are not recorded, for people."""
        headers = [loads(record)[0].get('headers') for record in self.unrecorded.values()]
        return [shown(each.get('id') if isinstance(each, dict) else None, 100) for each in headers]
