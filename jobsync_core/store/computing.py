"""A plan that is computed beside the agent: a quarter of a million locks take longer than a
heartbeat may wait.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from .plans import Draft

__all__ = ['Computation']


class Computation:
    """One plan that a thread computes, from values that nobody changes.

    Args:
        seen: Fingerprint of what it is made from.
        make: Computes it.
    """

    def __init__(self, seen: str, make: Callable[[], Draft]) -> None:
        self.seen = seen
        self._draft: Draft | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(
            target=self._run, args=(make,), name='jobsync plan', daemon=True
        )
        self._thread.start()

    def _run(self, make: Callable[[], Draft]) -> None:
        try:
            self._draft = make()
        except BaseException as error:  # of whatever kind: it is raised where the plan is asked for
            self._error = error

    def wait(self, seconds: float) -> bool:
        """Whether it has ended, after so many seconds at most."""
        self._thread.join(max(0.0, seconds))
        return not self._thread.is_alive()

    def result(self) -> Draft:
        """The plan; raises what computing it has raised."""
        if self._error is not None:
            raise self._error
        assert self._draft is not None
        return self._draft
