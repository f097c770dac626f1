"""What a node says of tasks that were audited before it entered."""

from __future__ import annotations

import contextlib
import datetime

from ..errors import JobSyncError
from ..logs import get_logger
from ..store.sessions import Sessions
from ..store.tables import Tables
from ..store.tasks import TaskStore

__all__ = ['tell_audited']

logger = get_logger(__name__)

#: Audited tasks beyond which the line about them says this number.
_MOST_COUNTED = 1_000_000


def tell_audited(
    name: str, date: datetime.date, sessions: Sessions, tables: Tables, *, begun: bool, taken: int
) -> None:
    """One line where tasks of the date were audited before: whether they run again must not come as
    a surprise.

    Args:
        name: The node's name.
        date: The date that counts.
        sessions: Connections to the database.
        tables: Names of the tables.
        begun: Whether a new cluster has begun with this node, so that they do.
        taken: Tasks of the node's tokens that do not.
    """
    with contextlib.suppress(JobSyncError):
        if begun:
            with sessions.session() as connection:
                number = TaskStore(connection, tables).count_audits(date, _MOST_COUNTED)
            if number:
                logger.info(
                    'node=%s date=%s: %d tasks were audited by a cluster that has ended, and run '
                    'again; resume=True keeps them',
                    name,
                    date,
                    number,
                )
        elif taken:
            logger.info(
                'node=%s date=%s: %d tasks of its tokens are audited already or taken by others, '
                'and do not run again here',
                name,
                date,
                taken,
            )
