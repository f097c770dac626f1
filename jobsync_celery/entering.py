"""A worker's node enters in two steps: it registers before the consumer exists, so that a worker
that cannot be a node ends at once; and it owns nothing before the consumer can take messages.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

from jobsync_core import clock
from jobsync_core.worker.node import WorkerNode

__all__ = ['Entry', 'KeepAlive']

#: Seconds between two looks whether the worker is to end meanwhile.
_LOOK_SEC = 0.05
#: Seconds within which entering ends that is given up.
_GIVE_UP_SEC = 10.0
#: Seconds between two heartbeats to RabbitMQ; the least that a worker can agree on are 3.
_BEAT_SEC = 1.0


class Entry:
    """Enters a node in a thread of its own, while the worker starts.

    Args:
        node: The worker's node.
    """

    def __init__(self, node: WorkerNode) -> None:
        self._node = node
        self._failure: list[BaseException] = []
        self._given_up = False
        self._thread = threading.Thread(target=self._enter, name='jobsync-enter', daemon=True)

    def register(self, check: Callable[[], object]) -> None:
        """Make the node known to the others; it owns nothing.

        Args:
            check: Called now and then; raises where the worker is to end.

        Raises whatever keeps it from that.
        """
        self._thread.start()
        self._wait(lambda: self._node.registered, check)

    def complete(self, check: Callable[[], object]) -> None:
        """Have the node take part, and wait for its first tokens, and until its duties have begun:
        the worker can take messages.

        Args:
            check: Called now and then; raises where the worker is to end.

        Raises whatever keeps it from that.
        """
        self._node.take_part()
        self._wait(lambda: False, check)

    def give_up(self) -> None:
        """End it, wherever it is."""
        if self._thread.is_alive():
            self._given_up = True
            self._node.give_up()
            self._thread.join(_GIVE_UP_SEC)

    def _enter(self) -> None:
        try:
            self._node.enter(waits=True)
            if not self._given_up:
                self._node.start()
        except BaseException as error:  # SystemExit of a lock_provider: nobody else hears of it
            self._failure.append(error)

    def _wait(self, enough: Callable[[], bool], check: Callable[[], object]) -> None:
        while self._thread.is_alive() and not enough():
            self._thread.join(_LOOK_SEC)
            check()
        if self._failure:
            raise self._failure[0]


class KeepAlive:
    """Sends heartbeats to RabbitMQ while no event loop does.

    Args:
        connections: The consumer's, and that of its events; any broker's, or None.
    """

    def __init__(self, *connections: Any) -> None:
        found = (each for each in connections if each is not None)
        self._connections = [each for each in found if each.transport.driver_type == 'amqp']
        self._due = clock.now() + _BEAT_SEC

    def look(self) -> None:
        """Send one, if it is time. That a connection is lost, the event loop finds out: kombu's
        would be opened anew here, without the consumer's channel, and for seconds.
        """
        if clock.now() < self._due:
            return
        self._due = clock.now() + _BEAT_SEC
        for connection in self._connections:
            if connection.connected:
                with contextlib.suppress(*connection.connection_errors):
                    connection.connection.send_heartbeat()
