"""What the plugin raises into Dramatiq, whose middleware hooks let only a MiddlewareError
through.
"""

from __future__ import annotations

from dramatiq.errors import ConnectionClosed
from dramatiq.middleware import MiddlewareError

from jobsync_core.errors import ConfigurationError, JobSyncError

__all__ = ['BootFailed', 'BrokerAway', 'DeclarationRefused', 'Unroutable']


class BootFailed(MiddlewareError, ConnectionClosed):
    """The worker cannot become a node. Of these two classes, so that the command line ends with
    exit code 3.
    """

    def __init__(self, message: str) -> None:
        Exception.__init__(self, message)
        self.message = message


class BrokerAway(ConnectionClosed):
    """The broker cannot be reached, and may be there later. Not where it refuses this user."""

    def __init__(self, message: str) -> None:
        Exception.__init__(self, message)
        self.message = message


class DeclarationRefused(MiddlewareError, ConfigurationError):
    """A declaration cannot work; the message names it and the remedy. It is a
    ConfigurationError.
    """


class Unroutable(MiddlewareError, JobSyncError):
    """No key can be made for a message, so that nobody can tell where it may run. It is among the
    dead letters; see the actor's key.
    """
