"""Who owns what, for routers; and the queues that belong to nodes.

AMQP cannot list queues, so the table `queue` remembers which there are. A row whose node is not in
the node table is an orphan: its messages are for whoever owns them now.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..belonging import Belonging, Peer

if TYPE_CHECKING:
    from psycopg2.extensions import connection as PgConnection

    from .tables import Tables

__all__ = [
    'Orphan',
    'draining',
    'forget',
    'heartbeats',
    'hold',
    'is_gone',
    'known',
    'old_orphans',
    'orphans',
    'owners',
    'peers',
    'record',
    'withdraw',
]

#: Seconds for which whoever holds what a node left may be silent, while the broker works.
_HOLD_SEC = 600


def record(
    connection: PgConnection, tables: Tables, name: str, node: str, belonging: Belonging
) -> bool:
    """Note that `node` has a queue of that name, and what it belongs to; True where the queue was
    not known before.
    """
    with connection.cursor() as cursor:
        cursor.execute(
            f"""
            INSERT INTO {tables.queue} (name, node, kind, broker, place, application) VALUES (%s,
                %s, %s, %s, %s, %s)
            ON CONFLICT (name) DO UPDATE SET node = excluded.node, kind = excluded.kind, gone_at =
                NULL, broker = excluded.broker,
                place = excluded.place, application = excluded.application
            RETURNING xmax = 0
            """,
            (name, node, belonging.kind, belonging.broker, belonging.place, belonging.application),
        )
        row = cursor.fetchone()
        return row is not None and bool(row[0])


def withdraw(connection: PgConnection, tables: Tables, name: str, node: str) -> None:
    """Take back what `record` noted, for a node that may not join: it made no queue."""
    with connection.cursor() as cursor:
        cursor.execute(f'DELETE FROM {tables.queue} WHERE name = %s AND node = %s', (name, node))


def peers(connection: PgConnection, tables: Tables, node: str, timeout: float) -> list[Peer]:
    """The other nodes that seem to live, oldest first, and what they belong to.

    By the server's clock, as nothing depends on it but whether a node that was just started is told
    of a mistake.

    Args:
        connection: A connection.
        tables: Names of the tables.
        node: The node that asks.
        timeout: Seconds without a heartbeat after which a node does not count.
    """
    with connection.cursor() as cursor:
        cursor.execute(
            f"""
            SELECT n.name, coalesce(q.kind, ''), coalesce(q.broker, ''), coalesce(q.place, ''),
                coalesce(q.application, '')
            FROM {tables.node} AS n LEFT JOIN {tables.queue} AS q ON q.node = n.name
            WHERE n.name <> %s AND n.last_heartbeat > clock_timestamp() - make_interval(secs => %s)
                -- a worker records its queue before it becomes active
                AND (n.state <> 'joining' OR q.node IS NOT NULL)
            ORDER BY n.created_on, n.name
            """,
            (node, timeout),
        )
        return [Peer(row[0], Belonging(*row[1:])) for row in cursor.fetchall()]


@dataclass(frozen=True)
class Orphan:
    """A queue of a node that is gone, and for how many seconds that has been known."""

    queue: str
    node: str
    age: float


def orphans(connection: PgConnection, tables: Tables, kind: str, young: float) -> list[Orphan]:
    """Queues of nodes that are gone, the newest first: those of which it has been known for less
    than `young` seconds.

    Which these are is written down here.
    """
    with connection.cursor() as cursor:
        cursor.execute(
            f"""
            SELECT q.name, q.node, extract(epoch FROM clock_timestamp() - q.gone_at)::float8 FROM
                {tables.queue} AS q
            WHERE q.kind = %s AND (q.gone_at IS NULL OR q.gone_at > clock_timestamp() -
                make_interval(secs => %s))
                AND NOT EXISTS (SELECT FROM {tables.node} AS n WHERE n.name = q.node)
            ORDER BY q.gone_at DESC NULLS FIRST, q.name
            """,
            (kind, young),
        )
        found = cursor.fetchall()
        fresh = [row[0] for row in found if row[2] is None]
        if fresh:
            cursor.execute(
                f"""
                UPDATE {tables.queue} AS q SET gone_at = clock_timestamp() WHERE q.name = ANY(%s)
                    AND q.gone_at IS NULL
                AND NOT EXISTS (SELECT FROM {tables.node} AS n WHERE n.name = q.node)
                """,
                (fresh,),
            )
        return [Orphan(queue, node, age or 0.0) for queue, node, age in found]


def old_orphans(connection: PgConnection, tables: Tables, kind: str, young: float) -> list[Orphan]:
    """Queues of nodes that have been gone for longer, the newest first."""
    with connection.cursor() as cursor:
        cursor.execute(
            f"""
            SELECT q.name, q.node, extract(epoch FROM clock_timestamp() - q.gone_at)::float8 FROM
                {tables.queue} AS q
            WHERE q.kind = %s AND q.gone_at <= clock_timestamp() - make_interval(secs => %s)
                AND NOT EXISTS (SELECT FROM {tables.node} AS n WHERE n.name = q.node)
            ORDER BY q.gone_at DESC, q.name
            """,
            (kind, young),
        )
        return [Orphan(*row) for row in cursor.fetchall()]


def known(connection: PgConnection, tables: Tables, kind: str) -> list[tuple[str, str]]:
    """All queues that a plugin's nodes have, or had when they were seen last: (queue, node)."""
    with connection.cursor() as cursor:
        cursor.execute(
            f'SELECT name, node FROM {tables.queue} WHERE kind = %s ORDER BY name', (kind,)
        )
        return [(row[0], row[1]) for row in cursor.fetchall()]


def heartbeats(connection: PgConnection, tables: Tables) -> dict[str, tuple[Any, ...]]:
    """A sign of life of each node in the node table; another one after each heartbeat."""
    with connection.cursor() as cursor:
        cursor.execute(f'SELECT name, incarnation, last_heartbeat FROM {tables.node}')
        return {row[0]: tuple(row[1:]) for row in cursor.fetchall()}


def draining(connection: PgConnection, tables: Tables, kind: str, me: str) -> list[Orphan]:
    """Queues of other nodes that live, drain, and have given all of their tokens away: what is in
    there is for others by now.
    """
    with connection.cursor() as cursor:
        cursor.execute(
            f"""
            SELECT q.name, q.node FROM {tables.queue} AS q JOIN {tables.node} AS n ON n.name =
                q.node
            WHERE q.kind = %s AND n.name <> %s AND n.state = 'draining'
            AND NOT EXISTS (SELECT FROM {tables.assignment} AS a WHERE a.node = n.name)
            ORDER BY q.name
            """,
            (kind, me),
        )
        return [Orphan(row[0], row[1], 0.0) for row in cursor.fetchall()]


def hold(connection: PgConnection, tables: Tables, node: str) -> bool:
    """Hold what a node left behind: nobody else sweeps it meanwhile, and a new life of the node
    does not begin to consume.

    The transaction holds it, so that it goes with its end, with the process, and with no other
    client of a pooler. A process that is stopped loses it after ten minutes.

    Args:
        connection: Its transaction stays idle while the broker works; it holds back no VACUUM,
            having no snapshot then.
        tables: Names of the tables.
        node: The node's name; '' for the parked messages.

    Returns:
        Whether it is held; nobody waits for another holder here.
    """
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT set_config('idle_in_transaction_session_timeout', %s, true), "
            'pg_try_advisory_xact_lock(hashtextextended(%s, 0))',
            (f'{_HOLD_SEC}s', f'jobsync {tables.label} {node}'),
        )
        return bool(cursor.fetchall()[0][1])


def is_gone(connection: PgConnection, tables: Tables, node: str) -> bool:
    """Whether the node is not in the node table."""
    with connection.cursor() as cursor:
        cursor.execute(f'SELECT NOT EXISTS (SELECT FROM {tables.node} WHERE name = %s)', (node,))
        return bool(cursor.fetchall()[0][0])


def forget(connection: PgConnection, tables: Tables, name: str) -> None:
    """The queue is gone, and so is its node."""
    with connection.cursor() as cursor:
        cursor.execute(
            f'DELETE FROM {tables.queue} AS q WHERE name = %s AND NOT EXISTS (SELECT FROM '
            f'{tables.node} AS n WHERE n.name = q.node)',
            (name,),
        )


def owners(
    connection: PgConnection, tables: Tables, known: int
) -> tuple[int, int, str, list[tuple[int, int, str, str | None]]] | None:
    """Who owns which tokens, or is about to; None where the version is still `known`.

    Returns:
        Version, total_tokens, hash_function, and rows (first token, end, node, the node's queue or
            None) by token.
    """
    with connection.cursor() as cursor:
        cursor.execute(
            f"""
            WITH now AS (SELECT version, total_tokens, hash_function FROM {tables.cluster} WHERE
                version <> %s)
            SELECT now.version, now.total_tokens, now.hash_function, lower(a.tokens),
                upper(a.tokens), a.owner, q.name
            FROM now
            LEFT JOIN (
                SELECT tokens, CASE WHEN moving THEN coalesce(moving_to, CASE WHEN NOT blocked THEN
                    node END) ELSE node END AS owner
                FROM {tables.assignment}
            ) AS a ON a.owner IS NOT NULL
            LEFT JOIN {tables.queue} AS q ON q.node = a.owner
            ORDER BY 4
            """,
            (known,),
        )
        rows: list[tuple[Any, ...]] = cursor.fetchall()
    if not rows:
        return None
    version, total, function = rows[0][:3]
    return (
        version,
        total,
        function,
        [(row[3], row[4], row[5], row[6]) for row in rows if row[3] is not None],
    )
