"""Rows of the claim and audit tables: which tasks nodes have begun, and which they have
finished.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from psycopg2.extensions import TRANSACTION_STATUS_IDLE

if TYPE_CHECKING:
    from psycopg2.extensions import connection as PgConnection

    from .tables import Tables

__all__ = [
    'audit',
    'audit_children',
    'claim',
    'count_audits',
    'get_audit',
    'history',
    'is_taken',
    'read_epoch',
    'release_claims',
    'release_promise',
]

#: Rows that one statement writes or deletes.
BATCH = 10_000


def claim(
    connection: PgConnection,
    tables: Tables,
    node: str,
    incarnation: str,
    date: datetime.date,
    rows: Sequence[tuple[str, int]],
    child: int | None = None,
) -> list[str]:
    """Record durably that `node` takes tasks; what is refused belongs to somebody else.

    A task is accepted when the database names this life of the node as owner of the token, nobody
    has audited the task for the date, and no other live node has claimed it; or when this life of
    the node has a claim already. The assignment rows are share-locked meanwhile: a hand-over of the
    token comes wholly before (then the claim is refused) or wholly after (then the new owner sees
    the claim).

    Args:
        connection: Where to write. If no transaction is open on it, the claims are committed when
            this returns.
        tables: Names of the tables.
        node: The node's name.
        incarnation: Its present life.
        date: The date of the audit.
        rows: Task id as text, and its token.
        child: The process, where a forked child takes the tasks for the audit: then the node's exit
            audits them.

    Returns:
        The texts that were accepted.
    """
    if not rows:
        return []
    texts = sorted({text for text, _ in rows})
    params = {
        'node': node,
        'incarnation': incarnation,
        'date': date,
        'texts': texts,
        'child': child,
        'task_ids': [text for text, _ in rows],
        'tokens': [token for _, token in rows],
    }
    # Alone it is one round trip and one implicit transaction; there is no moment at which a stopped
    # process would hold the locks.
    own = (
        connection.info.transaction_status == TRANSACTION_STATUS_IDLE and not connection.autocommit
    )
    if own:
        connection.autocommit = True
    try:
        with connection.cursor() as cursor:
            cursor.execute(_claim_sql(tables), params)
            return [row[0] for row in cursor.fetchall()]
    finally:
        if own and not connection.closed:
            connection.autocommit = False


def _claim_sql(tables: Tables) -> str:
    # The audit is looked at twice. An old owner that audits while this waits for its claim row
    # shows only to a statement that begins afterwards.
    return f"""
        WITH wanted AS MATERIALIZED (
            SELECT DISTINCT w.task_id, w.token FROM unnest(%(task_ids)s::text[], %(tokens)s::int[])
                AS w (task_id, token)
            WHERE NOT EXISTS (SELECT FROM {tables.audit} AS a WHERE a.task_id = w.task_id AND a.date
                = %(date)s AND {_counts(tables)})
        ), mine AS MATERIALIZED (
            SELECT w.task_id, w.token FROM wanted AS w JOIN {tables.assignment} AS a ON a.tokens @>
                w.token
            WHERE a.node = %(node)s
              AND EXISTS (SELECT FROM {tables.node} AS n WHERE n.name = %(node)s AND n.incarnation =
                  %(incarnation)s)
            ORDER BY a.tokens FOR SHARE OF a
        )
        INSERT INTO {tables.claim} AS c (node, task_id, created_on, date, token, incarnation, child)
        SELECT %(node)s, task_id, now(), %(date)s, token, %(incarnation)s, %(child)s FROM mine ORDER
            BY task_id
        ON CONFLICT (task_id, date) DO UPDATE
            SET node = excluded.node, created_on = excluded.created_on, token = excluded.token,
                incarnation = excluded.incarnation,
                promised = false, child = excluded.child
            WHERE NOT EXISTS (SELECT FROM {tables.node} AS n WHERE n.name = c.node AND n.incarnation
                = c.incarnation);
        UPDATE {tables.claim} SET promised = false, child = %(child)s
            WHERE task_id = ANY(%(texts)s::text[]) AND date = %(date)s AND node = %(node)s AND
                incarnation = %(incarnation)s
              AND (promised OR child IS DISTINCT FROM %(child)s);
        DELETE FROM {tables.claim} AS c USING {tables.audit} AS a
            WHERE c.task_id = ANY(%(texts)s::text[]) AND c.date = %(date)s AND c.node = %(node)s
              AND a.task_id = c.task_id AND a.date = c.date AND {_counts(tables)};
        SELECT c.task_id FROM {tables.claim} AS c JOIN {tables.node} AS n ON n.name = c.node AND
            n.incarnation = c.incarnation
            WHERE c.task_id = ANY(%(texts)s::text[]) AND c.date = %(date)s AND c.node = %(node)s AND
                c.incarnation = %(incarnation)s
            ORDER BY c.task_id
    """


def _counts(tables: Tables) -> str:
    """SQL: whether the audit row `a` is of the cluster that lives, and not of one that has
    ended.
    """
    return f'a.epoch >= (SELECT k.epoch FROM {tables.cluster} AS k)'


def read_epoch(connection: PgConnection, tables: Tables) -> int:
    """The cluster's epoch."""
    with connection.cursor() as cursor:
        cursor.execute(f'SELECT epoch FROM {tables.cluster}')
        row = cursor.fetchone()
        return int(row[0]) if row else 0


def count_audits(connection: PgConnection, tables: Tables, date: datetime.date, most: int) -> int:
    """How many tasks are audited for the date by clusters that have ended; `most` where there are
    more.
    """
    with connection.cursor() as cursor:
        cursor.execute(
            f'SELECT count(*) FROM (SELECT FROM {tables.audit} AS a WHERE a.date = %s AND NOT '
            f'({_counts(tables)}) LIMIT %s) AS t',
            (date, most),
        )
        row = cursor.fetchone()
        return int(row[0]) if row else 0


def audit(
    connection: PgConnection,
    tables: Tables,
    node: str,
    date: datetime.date,
    rows: Iterable[tuple[str, int]],
    epoch: int | None = None,
) -> None:
    """Record tasks, given as text and token, as finished by `node` for the date, and drop its
    claims on them.

    Args:
        connection: Where to write.
        tables: Names of the tables.
        node: The node's name.
        date: The date of the audit.
        rows: Task id as text, and its token.
        epoch: The cluster's epoch in which the tasks were taken; None: the present one.
    """
    tokens = dict(rows)
    if not tokens:
        return
    params = {
        'node': node,
        'date': date,
        'texts': list(tokens),
        'tokens': list(tokens.values()),
        'epoch': epoch,
    }
    with connection.cursor() as cursor:
        cursor.execute(
            f"""
            INSERT INTO {tables.audit} AS a (created_on, node, task_id, date, token, epoch)
            SELECT now(), %(node)s, task_id, %(date)s, token, coalesce(%(epoch)s, (SELECT epoch FROM
                {tables.cluster}), 0)
            FROM unnest(%(texts)s::text[], %(tokens)s::int[]) AS t (task_id, token)
            ORDER BY task_id {_ON_AUDITED};
            DELETE FROM {tables.claim} WHERE node = %(node)s AND date = %(date)s AND task_id =
                ANY(%(texts)s::text[])
            """,
            params,
        )


#: A row of a cluster that has ended gives way.
_ON_AUDITED = """ON CONFLICT (task_id, date) DO UPDATE
                SET created_on = excluded.created_on, node = excluded.node, token = excluded.token,
                    epoch = excluded.epoch
                WHERE a.epoch < excluded.epoch"""


def audit_children(
    connection: PgConnection,
    tables: Tables,
    node: str,
    incarnation: str,
    date: datetime.date,
    child: int | None = None,
) -> int:
    """Audit what forked children of this life of the node have taken for the audit; one batch.

    Args:
        connection: Where to write.
        tables: Names of the tables.
        node: The node's name.
        incarnation: Its present life.
        date: The date of the audit.
        child: Only what this process took; None: all of them.

    Returns:
        How many rows; there may be more where it is BATCH.
    """
    with connection.cursor() as cursor:
        cursor.execute(
            f"""
            WITH done AS (
                DELETE FROM {tables.claim} WHERE (task_id, date) IN (
                    SELECT c.task_id, c.date FROM {tables.claim} AS c
                    WHERE c.node = %(node)s AND c.incarnation = %(incarnation)s AND c.date =
                        %(date)s AND NOT c.promised
                      AND c.child IS NOT NULL AND (%(child)s::int IS NULL OR c.child = %(child)s)
                    LIMIT %(batch)s FOR UPDATE)
                RETURNING task_id, token
            ), kept AS (
                INSERT INTO {tables.audit} AS a (created_on, node, task_id, date, token, epoch)
                SELECT now(), %(node)s, task_id, %(date)s, token, (SELECT epoch FROM
                    {tables.cluster}) FROM done ORDER BY task_id
                {_ON_AUDITED}
            )
            SELECT count(*) FROM done
            """,
            {
                'node': node,
                'incarnation': incarnation,
                'date': date,
                'child': child,
                'batch': BATCH,
            },
        )
        row = cursor.fetchone()
        return int(row[0]) if row else 0


def get_audit(
    connection: PgConnection, tables: Tables, date: datetime.date
) -> list[dict[str, Any]]:
    """Who finished what for the date, in the order of recording: {'node', 'task_id'}."""
    with connection.cursor() as cursor:
        cursor.execute(
            f'SELECT node, task_id FROM {tables.audit} WHERE date = %s ORDER BY created_on, '
            'task_id',
            (date,),
        )
        return [{'node': node, 'task_id': task_id} for node, task_id in cursor.fetchall()]


def history(connection: PgConnection, tables: Tables, text: str) -> dict[str, Any]:
    """What is known of a task on its latest date: `audit` {'node', 'date', 'created_on', 'counts',
    'lives'} and `claim` {'node', 'date', 'created_on', 'promised'}, or None. An audit counts while
    the cluster lives in which it was written; a claim is a live node's.
    """
    with connection.cursor() as cursor:
        cursor.execute(
            f"""
            SELECT node, date, created_on, {_counts(tables)}, EXISTS (SELECT FROM {tables.node})
            FROM {tables.audit} AS a WHERE a.task_id = %s ORDER BY a.date DESC LIMIT 1
            """,
            (text,),
        )
        audited = cursor.fetchone()
        cursor.execute(
            f"""
            SELECT c.node, c.date, c.created_on, c.promised
            FROM {tables.claim} AS c JOIN {tables.node} AS n ON n.name = c.node AND n.incarnation =
                c.incarnation
            WHERE c.task_id = %s ORDER BY c.date DESC LIMIT 1
            """,
            (text,),
        )
        claimed = cursor.fetchone()
    return {
        'audit': dict(zip(('node', 'date', 'created_on', 'counts', 'lives'), audited, strict=True))
        if audited
        else None,
        'claim': dict(zip(('node', 'date', 'created_on', 'promised'), claimed, strict=True))
        if claimed
        else None,
    }


def is_taken(
    connection: PgConnection, tables: Tables, node: str, date: datetime.date, text: str
) -> bool:
    """Whether the task is audited for the date by anybody, or claimed for it by a live node other
    than `node`.
    """
    with connection.cursor() as cursor:
        cursor.execute(
            f"""
            SELECT EXISTS (SELECT FROM {tables.audit} AS a WHERE a.task_id = %(text)s AND a.date =
                %(date)s AND {_counts(tables)})
                OR EXISTS (SELECT FROM {tables.claim} AS c JOIN {tables.node} AS n ON n.name =
                    c.node AND n.incarnation = c.incarnation
                           WHERE c.task_id = %(text)s AND c.date = %(date)s AND c.node <> %(node)s)
            """,
            {'node': node, 'date': date, 'text': text},
        )
        row = cursor.fetchone()
        return bool(row and row[0])


def release_promise(
    connection: PgConnection,
    tables: Tables,
    node: str,
    incarnation: str,
    date: datetime.date,
    text: str,
) -> bool:
    """Take back what a hand-over recorded as promised to this life of the node; whether it was
    there, and not yet a claim.
    """
    with connection.cursor() as cursor:
        cursor.execute(
            f'DELETE FROM {tables.claim} WHERE task_id = %s AND date = %s AND node = %s AND '
            'incarnation = %s AND promised',
            (text, date, node, incarnation),
        )
        return cursor.rowcount == 1


def release_claims(
    connection: PgConnection,
    tables: Tables,
    node: str,
    incarnation: str,
    texts: Sequence[str] | None = None,
) -> int:
    """Delete claims of this life of the node, but those that its children took for the audit; one
    batch.

    Args:
        connection: Where to write.
        tables: Names of the tables.
        node: The node's name.
        incarnation: Its present life.
        texts: Only claims on these tasks, whoever took them; None: all.

    Returns:
        How many rows; there may be more where it is BATCH.
    """
    with connection.cursor() as cursor:
        cursor.execute(
            f"""
            DELETE FROM {tables.claim} WHERE (task_id, date) IN (
                SELECT task_id, date FROM {tables.claim}
                WHERE node = %(node)s AND incarnation = %(incarnation)s
                  AND CASE WHEN %(texts)s::text[] IS NULL THEN child IS NULL ELSE task_id =
                      ANY(%(texts)s) END
                LIMIT %(batch)s FOR UPDATE)
            """,
            {
                'node': node,
                'incarnation': incarnation,
                'texts': list(texts) if texts is not None else None,
                'batch': BATCH,
            },
        )
        return cursor.rowcount
