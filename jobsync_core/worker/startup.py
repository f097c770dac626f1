"""Servers that are not up yet when a worker starts, and tables that somebody has locked: it waits
for them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from .. import clock
from ..config import CoordinationConfig
from ..errors import DatabaseRefused, DatabaseUnavailable, LockNotAvailable
from ..store.blockers import BlockerStore, name_all
from ..store.sessions import Sessions
from ..store.tables import Tables

__all__ = ['wait_for_database', 'wait_for_server']

#: Seconds between two tries, and between two lines about it.
_TRY_AGAIN_SEC, _SAY_AGAIN_SEC = 1.0, 10.0
#: Tables that a worker reads or changes while it enters.
_USED = (
    'cluster',
    'node',
    'assignment',
    'ring',
    'queue_group',
    'lock',
    'queue',
    'node_queue',
    'claim',
    'audit',
)


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
    """Wait until the database answers, and nobody has locked a table that entering needs; what it
    says else is left for entering.

    Args:
        config: Where it is.
        limit_sec: Seconds to wait at most.
        check, sleep, log: As for `wait_for_server`.

    Raises:
        DatabaseUnavailable: It did not answer in time; or, LockNotAvailable, a table was still
            locked then.
    """
    sessions, tables = Sessions(config, 'jobsync start'), Tables.of(config)

    def reach() -> None:
        with sessions.session() as connection:
            if limit_sec and tables.are_found:
                _check_tables(BlockerStore(connection, tables), tables)

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


def _check_tables(store: BlockerStore, tables: Tables) -> None:
    """Raises LockNotAvailable where somebody has locked one."""
    found = store.on_tables([tables.all[name] for name in _USED])
    if found:
        raise LockNotAvailable(f'nothing can be entered: {name_all(found)}')


def _is_away(error: Exception) -> bool:
    """Whether nobody answered, or tables are locked. A server that refuses something else is
    there.
    """
    return isinstance(error, LockNotAvailable) or (
        isinstance(error, DatabaseUnavailable) and not isinstance(error, DatabaseRefused)
    )
