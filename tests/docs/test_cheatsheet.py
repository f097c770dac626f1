"""Every statement of the cheatsheet runs as printed on the default tables, and shows what it is
for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import psycopg2
import pytest

from jobsync_core import CoordinationConfig
from tests.support.waiting import eventually

from .blocks import ROOT, statements_of
from .stage import connected, entered

STATEMENTS = statements_of(ROOT / 'docs' / 'Cheatsheet.sql')
#: What the cluster of this test has nothing to show for.
EMPTY = (
    'Nodes without a heartbeat',
    'Nodes that are giving their tokens away',
    'Tokens on their way',
)

Cursor = psycopg2.extensions.cursor


@pytest.fixture
def cursor(make_config: Callable[..., CoordinationConfig]) -> Iterator[Cursor]:
    """On the tables of two nodes at work."""
    config = make_config()
    with entered(config, 'worker-01', 'worker-02@host') as (first, second):
        first.enroll(['mail'])
        eventually(lambda: first.owns('report-9', 'mail'))
        first.register_lock('render-1', 'gpu-%', 'no such node', expires_in_days=0.5)
        first.register_lock('report-9', 'worker-%', 'matches')
        eventually(lambda: first.explain('render-1')['blocked'])
        mine = next(task for task in range(100) if first.can_claim_task(task))
        first.add_task(mine)
        first.write_audit()
        other = next(task for task in range(mine + 1, 100) if first.can_claim_task(task))
        first.add_task(other)
        with pytest.raises(ZeroDivisionError), first.once('order:17'):
            raise ZeroDivisionError
        with first.once('order:17') as execution:
            execution.result = {'rows': 1}
        with pytest.raises(ZeroDivisionError), second.once('order:18'):
            raise ZeroDivisionError
        with second.once('order:19'), connected(config) as connection, connection.cursor() as found:
            found.execute(
                'INSERT INTO sync_audit (node, task_id, date) VALUES (%s, %s, current_date)',
                ('worker-01', 'order-17'),
            )
            yield found


def test_the_cheatsheet_is_read_whole() -> None:
    text = (ROOT / 'docs' / 'Cheatsheet.sql').read_text(encoding='utf-8')
    assert (
        sum(line.endswith(';') for line in text.splitlines() if not line.startswith('--'))
        == len(STATEMENTS)
        > 20
    )


def test_every_statement_runs_and_every_query_has_something_to_show(cursor: Cursor) -> None:
    seen = set()
    for comment, statement in STATEMENTS:
        cursor.execute(statement)
        if cursor.description is not None:
            empty = next((start for start in EMPTY if comment.startswith(start)), None)
            seen.add(empty)
            assert bool(cursor.fetchall()) != (empty is not None), f'{comment}\n{statement}'
    assert seen == {None, *EMPTY}


def test_the_queries_tell_the_truth(cursor: Cursor) -> None:
    answers = {}
    for comment, statement in STATEMENTS:
        cursor.execute(statement)
        if cursor.description is not None:
            answers[comment] = cursor.fetchall()
    assert answers['Nodes with a heartbeat in the last 15 seconds (the default timeout).'] == [(2,)]
    assert len(answers['The leader: the oldest live node.']) == 1
    assert answers['Does every token have exactly one row? (The database itself refuses two.)'] == [
        (10_000, 10_000)
    ]
    assert [
        row[0]
        for row in answers[
            'Locks none of whose patterns matches a live node: their tasks are blocked.'
        ]
    ] == ['render-1']
    assert dict(answers['Executions by state.']) == {'done': 1, 'failed': 1, 'running': 1}
    assert (
        answers['Who owns one token?'][0][0]
        == answers['The same without walking through the view.'][0][0]
    )
