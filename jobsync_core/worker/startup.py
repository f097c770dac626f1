"""Servers that are not up yet when a worker starts: it waits for them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from .. import clock
from ..config import CoordinationConfig
from ..errors import DatabaseRefused, DatabaseUnavailable
from ..store.sessions import Sessions

__all__ = ['wait_for_database', 'wait_for_server']

#: Seconds between two tries, and between two lines about it.
_TRY_AGAIN_SEC, _SAY_AGAIN_SEC = 1.0, 10.0


def wait_for_server(
    reach: Callable[[], object],
    is_away: Callable[[Exception], bool],
    limit_sec: float,
    remark: str,
    *,
    check: Callable[[], object],
    sleep: Callable[[float], Any],
    log: logging.Logger,
) -> None:
    """Wait until a server can be reached, with one line in a while.

    Args:
        reach: Tries it.
        is_away: Whether what that raised means that the server may be there later; anything else is
            raised at once.
        limit_sec: Seconds to wait at most.
        remark: What the line says of the limit.
        check: Called before each try; raises to give up.
        sleep: Waits for a number of seconds, or less.
        log: Where the lines go.

    Raises:
        Exception: What `reach` raised last.
    """
    began = clock.now()
    said = float('-inf')
    while True:
        check()
        try:
            reach()
            return
        except Exception as error:
            now = clock.now()
            if not is_away(error) or now - began >= limit_sec:
                raise
            if now - said >= _SAY_AGAIN_SEC:
                said = now
                log.error('JobSync: %s -- waiting for it%s', ' '.join(str(error).split()), remark)
        sleep(_TRY_AGAIN_SEC)


def wait_for_database(
    config: CoordinationConfig,
    limit_sec: float,
    *,
    check: Callable[[], object],
    sleep: Callable[[float], Any],
    log: logging.Logger,
) -> None:
    """Wait until the database answers; what it says else is left for entering.

    Args:
        config: Where it is.
        limit_sec: Seconds to wait at most.
        check, sleep, log: As for `wait_for_server`.

    Raises:
        DatabaseUnavailable: It did not answer in time.
    """
    sessions = Sessions(config, 'jobsync start')

    def reach() -> None:
        with sessions.session():
            pass

    try:
        wait_for_server(
            reach,
            _is_away,
            limit_sec,
            f', for {limit_sec:.0f} s at most (wait_for_database_sec)',
            check=check,
            sleep=sleep,
            log=log,
        )
    finally:
        sessions.close_all()


def _is_away(error: Exception) -> bool:
    """Whether nobody answered. A server that refuses something is there."""
    return isinstance(error, DatabaseUnavailable) and not isinstance(error, DatabaseRefused)
