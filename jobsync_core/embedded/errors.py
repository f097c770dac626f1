"""What can go wrong with a server of one's own."""

from __future__ import annotations

from ..errors import JobSyncError

__all__ = ['EmbeddedServerError']


class EmbeddedServerError(JobSyncError, RuntimeError):
    """The embedded server cannot be started. The message says why."""
