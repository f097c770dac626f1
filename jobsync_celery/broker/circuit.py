"""A broker that takes no messages is waited for once, not once for each message: the event loop has
other work.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from ..logs import get_logger

__all__ = ['BrokerBusy', 'Circuit']

logger = get_logger(__name__)

#: Seconds between two looks whether it takes messages again.
_LOOK_SEC = 1.0


class BrokerBusy(Exception):
    """The broker did not take a message in time, and was not asked again. RabbitMQ does so while it
    is short of memory or disk space: see its alarms (`rabbitmq-diagnostics alarms`).
    """


class Circuit:
    """Open from the moment at which the broker did not answer in time until it does; meanwhile
    nobody waits for it.

    Args:
        probe: Sends the broker something that does no harm, and raises what says that it was not
            taken. On a thread of its own.
        look_sec: Seconds between two probes.
    """

    def __init__(self, probe: Callable[[], object], look_sec: float = _LOOK_SEC) -> None:
        self._probe = probe
        self._look_sec = look_sec
        self._closed = threading.Event()  # as of an electrical circuit: what is closed conducts
        self._closed.set()
        self._end = threading.Event()

    @property
    def is_open(self) -> bool:
        """Whether the broker is known to take nothing now."""
        return not self._closed.is_set()

    def check(self) -> None:
        """Nothing, where the broker may be asked.

        Raises:
            BrokerBusy: It has not answered, and has not been found to answer again.
        """
        if self.is_open:
            raise BrokerBusy('the broker takes no messages at present')

    def open(self, error: BaseException) -> None:
        """It has not answered in time."""
        if self.is_open or self._end.is_set():
            return
        self._closed.clear()
        logger.warning(
            'JobSync: the broker did not take a message in time (%r): what belongs to other nodes '
            'waits here until it does. '
            'RabbitMQ says why in its alarms (rabbitmq-diagnostics alarms)',
            error,
        )
        try:
            threading.Thread(target=self._watch, name='jobsync-circuit', daemon=True).start()
        # this process can start no more threads: nobody would find the broker well again
        except RuntimeError as trouble:
            logger.warning('JobSync: the broker is asked again for each message: %r', trouble)
            self._closed.set()

    def _watch(self) -> None:
        while not self._end.wait(self._look_sec):
            try:
                self._probe()
            except Exception as error:  # whatever the broker's client raises
                logger.debug('the broker still takes nothing: %r', error)
                continue
            logger.info('JobSync: the broker takes messages again')
            self._closed.set()
            return

    def close(self) -> None:
        """Look no more."""
        self._end.set()
