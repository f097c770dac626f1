"""What an operator is shown of queue groups agrees with the tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from jobsync_core.assignment.groups import GROUP_SPAN
from jobsync_core.assignment.hashing import task_to_token
from jobsync_core.assignment.simulate import Move
from jobsync_core.config import CoordinationConfig
from jobsync_core.errors import JobSyncError
from jobsync_core.store.locks import LockStore
from jobsync_core.store.status import StatusStore
from tests.support.rows import Rows, rows_of

_TOKEN = task_to_token('t', 10_000, 'double_sha256')


@pytest.fixture
def rows(config: CoordinationConfig) -> Iterator[Rows]:
    """Two groups: `a` of n1 and n2, `b` of n2 alone, and `c`, which nobody consumes."""
    with rows_of(config) as found:
        for name, groups in (('n1', ['a']), ('n2', ['a', 'b'])):
            found.node(name)
            found.run(f'UPDATE {found.tables.node} SET groups = %s WHERE name = %s', groups, name)
        for number, name in enumerate('abc', 1):
            found.run(f'INSERT INTO {found.tables.queue_group} VALUES (%s, %s, true)', number, name)
        found.own(0, 10_000, 'n1')
        own(found, 1, 0, 5_000, 'n1')
        own(found, 1, 5_000, 10_000, 'n2')
        own(found, 2, 0, 9_000, 'n2')
        own(found, 2, 9_000, 9_500, None, blocked=True)
        yield found


def own(
    rows: Rows, group: int, lo: int, hi: int, node: str | None, *, blocked: bool = False
) -> None:
    first = group * GROUP_SPAN
    rows.run(
        f'INSERT INTO {rows.tables.ring} (tokens, node, blocked, version) '
        'VALUES (int4range(%s, %s), %s, %s, 1)',
        first + lo,
        first + hi,
        node,
        blocked,
    )


def ask(rows: Rows, question: Callable[..., Any], *args: object) -> Any:
    with rows.sessions.session() as connection:
        return question(StatusStore(connection, rows.tables), *args)


def lock(rows: Rows, task_id: str, pattern: str, queue: str | None) -> None:
    with rows.sessions.session() as connection:
        LockStore(connection, rows.tables).register(
            [(task_id, (pattern,), 'why', None, queue)], 'tester'
        )


def test_each_group_is_counted_by_itself(rows: Rows) -> None:
    first, second = ask(rows, StatusStore.groups)
    assert first == {
        'queue_group': 'a',
        'members': ['n1', 'n2'],
        'nodes': {'n1': 5_000, 'n2': 5_000},
        'unowned_tokens': 0,
        'moving_tokens': 0,
        'blocked_tokens': 0,
    }
    assert (second['nodes'], second['unowned_tokens'], second['blocked_tokens']) == (
        {'n2': 9_000},
        1_000,
        500,
    )
    # What is counted elsewhere is of the plain Job alone.
    nodes = ask(rows, StatusStore.nodes)
    assert [(node['tokens'], node['groups']) for node in nodes] == [
        (10_000, ['a']),
        (0, ['a', 'b']),
    ]


def test_who_has_what_it_has_left_is_shown_until_it_has_given_it(rows: Rows) -> None:
    rows.run(f"UPDATE {rows.tables.node} SET groups = '{{a}}' WHERE name = 'n2'")
    _, left = ask(rows, StatusStore.groups)
    assert (left['members'], left['nodes']) == ([], {'n2': 9_000})


def test_a_key_has_an_owner_in_each_group(rows: Rows) -> None:
    owners = {
        group: ask(rows, StatusStore.explain, 't', _TOKEN, group)['owner'] for group in ('', 'b')
    }
    assert owners == {'': 'n1', 'b': 'n2'}
    in_a = ask(rows, StatusStore.explain, 't', 1, 'a')
    # It goes to a node that consumes the queue, and there is no other one for `b`.
    assert (in_a['owner'], in_a['next']) == ('n1', 'n2')
    assert ask(rows, StatusStore.explain, 't', 1, 'b')['next'] is None


def test_a_group_that_there_is_not_is_refused_with_those_that_there_are(rows: Rows) -> None:
    with pytest.raises(JobSyncError, match=r"no queue group 'x'.*'a', 'b', 'c'"):
        ask(rows, StatusStore.explain, 't', _TOKEN, 'x')


@pytest.mark.parametrize(
    ('queue', 'seen_in'), [(None, ['', 'a', 'b']), ('a', ['a']), ('nobody names it', [])]
)
def test_a_lock_counts_where_it_says(rows: Rows, queue: str | None, seen_in: list[str]) -> None:
    lock(rows, 't', 'n2', queue)
    found = [
        group
        for group in ('', 'a', 'b')
        if ask(rows, StatusStore.explain, 't', _TOKEN, group)['lock'] is not None
    ]
    assert found == seen_in
    rows.run(f'UPDATE {rows.tables.assignment} SET blocked = true')
    (blocked,) = ask(rows, StatusStore.blocked)
    assert bool(blocked['locks']) is ('' in seen_in)


def test_a_lock_is_matched_by_nodes_that_consume_the_queue(rows: Rows) -> None:
    lock(rows, 't', 'n1', None)
    found = {group: ask(rows, StatusStore.explain, 't', _TOKEN, group)['pattern'] for group in 'ab'}
    assert found == {'a': 'n1', 'b': None}


@pytest.mark.parametrize(('pin', 'heir'), [(False, None), (True, 'n2')])
def test_a_pin_that_no_member_matches_leaves_its_token_to_anybody(
    rows: Rows, pin: bool, heir: str | None
) -> None:
    with rows.sessions.session() as connection:
        LockStore(connection, rows.tables).register(
            [('t', ('gpu',), 'why', None, None)], 'tester', pin
        )
    own(rows, 3, 0, 10_000, 'n1')
    rows.run(f"UPDATE {rows.tables.node} SET groups = '{{a,c}}'")
    assert ask(rows, StatusStore.explain, 't', _TOKEN, 'c')['next'] == heir


def test_what_a_drain_would_move_is_of_all_groups(rows: Rows) -> None:
    assert Move('n1', 'n2', 15_000) in ask(rows, StatusStore.plan_without, 'n1')
    # Nobody else consumes `b`.
    assert Move('n2', None, 9_000) in ask(rows, StatusStore.plan_without, 'n2')
