"""What a heartbeat costs in a large cluster, and what somebody's transaction that stays open adds
to it.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator

import psycopg2

from jobsync_core import CoordinationConfig
from jobsync_core.process import Process
from jobsync_core.protocol.messages.leadership import Lead, Observe
from jobsync_core.protocol.messages.membership import Beat, Join
from jobsync_core.store.cluster import ClusterStore
from jobsync_core.store.connection import Connection
from jobsync_core.store.schema import create_schema
from jobsync_core.store.tables import Tables

from .rounds import Bench, Samples
from .table import Limit, Row

__all__ = ['heartbeats']

#: Heartbeats of each node in 30 minutes, with the default interval.
_BEATS = 360
#: As heartbeats were sent up to 0.1.0: each read all older nodes.
_FORMER = """
    UPDATE {node} AS n SET beat = beat + 1, last_heartbeat = clock_timestamp() WHERE n.name = %s AND
        n.incarnation = %s
    RETURNING (SELECT c.version FROM {cluster} AS c), n.state,
        (SELECT json_agg(json_build_array(o.name, o.incarnation, o.beat) ORDER BY o.created_on,
            o.name)::text
         FROM {node} AS o WHERE (o.created_on, o.name) < (n.created_on, n.name))"""


def heartbeats(bench: Bench) -> list[Row]:
    """The youngest of 500 nodes beats, before and after 30 minutes for which a transaction has
    stayed open.
    """
    nodes = 100 if bench.quick else 500
    samples = Samples()
    with bench.databases.database() as found:
        config = CoordinationConfig(
            host=found['host'],
            port=found['port'],
            user=found['user'],
            password=found['password'],
            dbname=found['dbname'],
        )
        create_schema(config)
        tables, connection = Tables.of(config), Connection.open(config, 'bench')
        control = ClusterStore(config, tables, None)
        names = [f'node-{number}' for number in range(nodes)]
        for name in names:
            control.handle(connection, Join(name, name, Process('', '', '', 1, ''), 1.0, True))
        control.handle(connection, Lead(names[0], names[0], (), 'bench'))
        beaten = control.handle(connection, Beat(names[-1], names[-1]))
        since = getattr(beaten, 'since', 0)
        former = _FORMER.format(node=tables.node, cluster=tables.cluster)

        def measure(when: str) -> None:
            samples.add(
                bench.sides[0],
                {
                    f'beat {when}': _milliseconds(
                        lambda: control.handle(connection, Beat(names[-1], names[-1], since))
                    ),
                    f'former {when}': _milliseconds(
                        lambda: connection.execute(former, (names[-1], names[-1]))
                    ),
                    f'look {when}': _milliseconds(lambda: control.handle(connection, Observe())),
                },
            )

        measure('before')
        with _open_transaction(found):
            for _ in range(_BEATS):
                connection.execute(
                    f'UPDATE {tables.node} SET beat = beat + 1, last_heartbeat = clock_timestamp()'
                )
            measure('after')
        connection.close()
    bench.raw['heartbeats'] = samples.values
    note = (
        f'{nodes} nodes, of which the youngest beats, first decile, commit included. Then each '
        f'node has sent {_BEATS} heartbeats, '
        'which is half an hour, while a REPEATABLE READ transaction is open, so that no version '
        'of a row can go.'
    )
    why = 'The statement of 0.1.0, on the same tables: it reads all older nodes.'
    rows = []
    for when, label in (('before', ''), ('after', ', a transaction open for 30 min')):
        limit = Limit(5) if when == 'after' else None
        rows.append(
            samples.row(
                f'beat {when}',
                f'heartbeat of one of {nodes} nodes{label}',
                'ms',
                note=note,
                limit=limit,
            )
        )
        rows.append(samples.row(f'former {when}', f'the same as in 0.1.0{label}', 'ms', note=why))
        rows.append(
            samples.row(
                f'look {when}', f"the leader's look at {nodes} nodes{label}", 'ms', note=note
            )
        )
    return rows


def _milliseconds(call: Callable[[], object]) -> float:
    """The tenth part of 100 calls took at most so long: what the call takes when nothing else on
    the machine disturbs it.
    """
    taken = []
    for _ in range(100):
        began = time.perf_counter()
        call()
        taken.append(time.perf_counter() - began)
    return statistics.quantiles(taken, n=10)[0] * 1000


@contextlib.contextmanager
def _open_transaction(found: dict[str, object]) -> Iterator[None]:
    """Somebody's transaction with a snapshot, until the end of the block."""
    other = psycopg2.connect(**found)  # type: ignore[call-overload]  # host, port, user, password, dbname
    try:
        with other.cursor() as cursor:
            cursor.execute('BEGIN ISOLATION LEVEL REPEATABLE READ')
            cursor.execute('SELECT count(*) FROM pg_class')
            yield
    finally:
        other.close()
