"""A delivery on its way from the consumer to the pool: what the gate knows of it, and what may
become of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jobsync_core.worker.inbox import Received
from jobsync_core.worker.routing import HOME, HOPS, KEY, REDELIVERED, REFUSED, RETURNS

__all__ = [
    'Delivery',
    'Note',
    'Strategies',
    'note_of',
    'settle_once',
    'mark_redelivered',
    'unstamped',
]

_NOTE = 'jobsync_note'


class Strategies(dict):  # type: ignore[type-arg]  # celery's mapping, task name -> strategy
    """The consumer's strategies; each that is put in is wrapped, also after a reconnect or a
    reload.
    """

    def __init__(self, wrap: Callable[[str, Any], Any]) -> None:
        super().__init__()
        self._wrap = wrap

    def __setitem__(self, name: str, strategy: Any) -> None:
        super().__setitem__(name, self._wrap(name, strategy))


@dataclass(frozen=True)
class Note:
    """What the gate knows of a message.

    Attributes:
        name: Its task.
        key: The route that goes with it when it is passed on, and whose token it runs on; '' for
            none.
        home: The queue that it was sent to.
        received: What its way is decided by.
    """

    name: str
    key: str
    home: str
    received: Received

    def keep(self, message: Any) -> None:
        """Keep this with the message, until its request comes to the pool."""
        vars(message)[_NOTE] = self


def note_of(message: Any) -> Note | None:
    """What was kept with a message; None where it needs no gate."""
    found: Note | None = getattr(message, _NOTE, None) or vars(message).get(_NOTE)
    return found


@dataclass
class Delivery:
    """A message that is not acknowledged, until it can go somewhere.

    Attributes:
        note: What the gate knows of it.
        received: What its way is decided by; as in the note, but for when it is parked.
        message: Kombu's message.
        run, ack, requeue, refuse: What may become of it here; `refuse` is a rejection for good.
        late: It has passed all that comes before the pool.
        failed: It could not be sent the last time, and not because the broker took nothing.
    """

    note: Note
    received: Received
    message: Any
    run: Callable[[], object]
    ack: Callable[[], object]
    requeue: Callable[[], object]
    refuse: Callable[[], object]
    late: bool = False
    failed: bool = False


def unstamped(message: Any) -> dict[str, Any]:
    """The headers of a message without JobSync's own."""
    return {
        name: value
        for name, value in (message.headers or {}).items()
        if name not in (KEY, HOPS, HOME, REDELIVERED, REFUSED, RETURNS)
    }


def mark_redelivered(message: Any) -> None:
    """Tell the task that its message had been delivered before it was passed on: it may have
    rejected it then.
    """
    headers = message.headers
    if isinstance(headers, Mapping) and headers.get(REDELIVERED) is True:
        message.delivery_info['redelivered'] = True


def settle_once(message: Any) -> None:
    """Let a message that was set aside be acknowledged once more without an error: in the event
    loop that would end the worker.
    """

    def quiet(action: Callable[..., object]) -> Callable[..., object]:
        return lambda *args, **kwargs: None if message.acknowledged else action(*args, **kwargs)

    vars(message).update(
        ack_log_error=quiet(message.ack_log_error), reject_log_error=quiet(message.reject_log_error)
    )
