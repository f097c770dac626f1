"""Whether the broker answers: each node asks for itself, as those who take messages may learn late
that a connection is silent.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from ... import clock
from .duty import Moment

__all__ = ['BrokerAnswers']

#: Seconds between two questions, and for which an answer is waited for.
_EVERY_SEC, _PATIENCE_SEC = 2.0, 3.0


class BrokerAnswers:
    """Asks the broker something small, with a lease or without. Any thread may ask for `problem`.

    Args:
        ask: Asks; raises where there is no answer.
    """

    name = 'broker'

    def __init__(self, ask: Callable[[], object]) -> None:
        self._ask = ask
        self._at = -math.inf
        #: Since when an answer is due; None: none is.
        self._asked_at: float | None = None
        self._trouble = ''

    def due(self, moment: Moment) -> float:
        """Seconds until the next question."""
        return self._at - moment.now

    def run(self, moment: Moment, stop: Callable[[], bool]) -> None:
        """Ask."""
        self._at = moment.now + _EVERY_SEC
        self._asked_at = moment.now
        try:
            self._ask()
            self._trouble = ''
        except Exception as error:  # whatever the broker's client raises
            # Without its text, which may name an address with a password.
            self._trouble = f'the broker does not answer: {type(error).__name__}'
            raise
        finally:
            self._asked_at = None

    def failed(self) -> None:
        """Another duty got an error that may be the broker's: it counts as away until it has
        answered; it is asked at once.
        """
        self._at, self._trouble = -math.inf, 'the broker does not answer'

    def problem(self) -> str:
        """Why the broker counts as away; '' where it answers."""
        asked_at = self._asked_at
        if asked_at is not None and clock.now() - asked_at > _PATIENCE_SEC:
            return 'the broker does not answer'
        return self._trouble
