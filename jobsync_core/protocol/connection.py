"""The control connection, and the history of the database that answers on it.

A promoted standby, which may lack the last writes, begins another history. Each heartbeat asks by
which name the history goes, and whether it still holds the last heartbeat that was answered.
"""

from __future__ import annotations

from enum import Enum

from .agenda import NEVER, NOW, Due
from .messages.connection import Connect, ConnectReply, RecordHistory
from .messages.handover import RefreshReply
from .messages.membership import HeartbeatReply
from .messages.signs import Life

__all__ = ['Connection', 'History']

_BACKOFF_FIRST, _BACKOFF_MOST = 0.1, 1.0
#: Seconds after which a connection counts as one that works: what ends it then is a first failure.
_STEADY_SEC = 0.5


class History(Enum):
    """What a heartbeat's answer tells of the database's history."""

    KNOWN = 'known'  # that of the last answer, or one in which all earlier leases are over
    UNSETTLED = 'unsettled'  # this node knows of none before, and nobody has waited in this one
    CHANGED = 'changed'  # another one than that of the last answer


class Connection:
    """One node's connection, and what it knows of the histories behind it.

    Args:
        timeout: Seconds after which all leases of another history are over.

    Attributes:
        connected: Whether there is a connection.
        history: The name of the database's history; '' while unknown.
        seen: What the row's heartbeat number was at the last answer; 0 before the first one.
        quarantine_until: When all leases of another history are over; NEVER where none can be
            valid.
    """

    def __init__(self, timeout: float) -> None:
        self.connected = False
        self.history = ''
        self.seen = 0
        self.quarantine_until = NEVER
        self._timeout = timeout
        self._retry_at = 0.0
        self._backoff = _BACKOFF_FIRST
        self._opened_at = 0.0
        self._server = ''
        self._number = 0  # of the last heartbeat that was sent
        self._waits = False  # in this history old leases have been waited out, or are
        self._must_record = False

    @property
    def quarantined(self) -> bool:
        """Whether leases of another history may be valid."""
        return self.quarantine_until < NEVER

    def connect(self) -> Due:
        """A new connection."""
        return self._retry_at, Connect

    def record_history(self, life: Life) -> Due:
        """The history's name is written once old leases have been waited out in it."""
        return NOW if self._must_record else NEVER, lambda: self._record_history(life)

    def _record_history(self, life: Life) -> RecordHistory:
        self._must_record = False  # the next heartbeat tells whether it is still to be done
        return RecordHistory(*life, self.seen, self.history)

    def number_heartbeat(self) -> tuple[int, int]:
        """The number of the heartbeat that is sent now, and that of the last one answered."""
        self._number += 2
        return self._number, self.seen

    def opened(self, reply: ConnectReply, now: float) -> bool:
        """There is a connection; whether it leads to another server than the one before."""
        self.connected, self._opened_at = True, now
        other = bool(self._server and reply.server) and self._server != reply.server
        self._server = reply.server
        return other

    def lost(self, now: float) -> None:
        """There is none any more."""
        if self.connected and now - self._opened_at >= _STEADY_SEC:
            self._backoff = _BACKOFF_FIRST
        self.connected = False
        self._retry_at = now + self._backoff
        self._backoff = min(2 * self._backoff, _BACKOFF_MOST)

    def heard(self, reply: HeartbeatReply) -> History:
        """A heartbeat was answered. Where the history is not known, old leases have to be waited
        out.
        """
        self.seen = self._number if reply.same else self._number + 1
        changed = not reply.same or bool(reply.history) and self.history not in ('', reply.history)
        self.history = reply.history or self.history
        self._must_record = not reply.settled
        if not changed and (reply.settled or self._waits):
            return History.KNOWN
        self._waits = True
        return History.CHANGED if changed else History.UNSETTLED

    def is_of_another_history(self, reply: RefreshReply) -> bool:
        """Whether rows come from another history than the last heartbeat's."""
        return not reply.same or reply.history not in ('', self.history)

    def begin_quarantine(self, now: float) -> None:
        """Leases of another history may be valid for one timeout."""
        self.quarantine_until = now + self._timeout

    def end_quarantine(self) -> None:
        """They are over."""
        self.quarantine_until = NEVER

    def begin_life(self) -> None:
        """This node begins another life."""
        self.seen = 0
        self._waits = False  # the database may be another one by the time of the next answer
