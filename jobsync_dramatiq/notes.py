"""What the gate knows of a message in hand: a note that goes with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dramatiq.middleware import SkipMessage

from jobsync_core.worker.inbox import Received

from .broker.interface import QueueConsumer

__all__ = ['Note', 'attach_note', 'be_quiet', 'is_quiet', 'note_of', 'requeue_instead', 'skip']


@dataclass
class Note:
    """What the gate knows of a message in hand.

    Attributes:
        source: Where it came from, and is acknowledged.
        received: What decides on it.
        again: When it may be sent, after that has failed.
        goes_back: It goes back to its queue instead of being acknowledged.
        unseen: No middleware but this one has seen it.
        sent_on: It is gone, or back in its queue; what becomes of it here does not count.
        exhausted: It fails, and no retry can help.
    """

    source: QueueConsumer
    received: Received
    again: float = 0.0
    goes_back: bool = False
    unseen: bool = False
    sent_on: bool = False
    exhausted: bool = False


def attach_note(message: Any, note: Note) -> None:
    """Have a note go with a message."""
    vars(message)['jobsync_note'] = note


def note_of(message: Any) -> Note | None:
    """The note of a message that came through the gate."""
    found = vars(message).get('jobsync_note')
    return found if isinstance(found, Note) else None


def requeue_instead(message: Any, note: Note) -> SkipMessage:
    """Have the message go back to its queue instead of being acknowledged; raise what this
    returns.
    """
    note.goes_back = True
    return skip(message, 'jobsync: the message goes back')


def skip(message: Any, reason: str) -> SkipMessage:
    """End this delivery of a message, without a result and without Dramatiq's line in the log;
    raise what this returns.
    """
    # A skipped message would get the result None, for which a group may wait.
    message.options['store_results'] = False
    be_quiet(message)
    return SkipMessage(reason)


def be_quiet(message: Any) -> None:
    """Have Dramatiq write no line of its own about the end of this delivery."""
    vars(message)['jobsync_quiet'] = True


def is_quiet(item: object) -> bool:
    """Whether this is a message of whose end Dramatiq is to write nothing."""
    return bool(getattr(item, '__dict__', {}).get('jobsync_quiet'))
