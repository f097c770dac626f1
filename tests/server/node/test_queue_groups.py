"""Nodes with queue groups against a real PostgreSQL: each group's tokens belong to its members
alone.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable

import pytest

from jobsync_core import ConfigurationError, CoordinationConfig, Job, TokenSet
from jobsync_core.assignment.groups import GROUP_SPAN, group_of
from tests.support.cluster import node_of, query
from tests.support.waiting import eventually

MakeConfig = Callable[..., CoordinationConfig]
TASKS = [f'task-{number}' for number in range(200)]


def node(config: CoordinationConfig, name: str, groups: Iterable[str] = (), **more: object) -> Job:
    return Job(name, config, wait_on_enter=0, groups=groups, **more)  # type: ignore[arg-type]


def share(job: Job, group: str) -> set[str]:
    """The tasks that a node owns in a group."""
    return {task for task in TASKS if job.owns(task, group)}


def shared(group: str, *jobs: Job) -> bool:
    """Whether each of them owns some tasks of the group, and all together own each task once."""
    shares = [share(job, group) for job in jobs]
    return all(shares) and sorted(task for found in shares for task in found) == sorted(TASKS)


def held(config: CoordinationConfig) -> dict[str, int]:
    """The tokens of each group that the database gives to somebody, by the view for people."""
    return dict(
        query(
            config, 'SELECT queue_group, count(*)::int FROM "{}group_token" GROUP BY 1 ORDER BY 1'
        )
    )


def test_each_group_is_shared_by_its_members_alone_and_all_share_the_plain_tokens(
    config: CoordinationConfig,
) -> None:
    with (
        node(config, 'n1', ['mail', 'fast']) as first,
        node(config, 'n2', ['mail']) as second,
        node(config, 'n3') as third,
    ):
        eventually(lambda: shared('', first, second, third))
        eventually(lambda: shared('mail', first, second) and shared('fast', first))
        assert share(third, 'mail') == share(second, 'fast') == share(third, 'fast') == set()
        assert first.holds('mail') and first.holds('') and not third.holds('mail')
        assert held(config) == {'fast': config.total_tokens, 'mail': config.total_tokens}
        assert sum(len(job.my_tokens) for job in (first, second, third)) == config.total_tokens
        assert all(group_of(token) == 0 for token in first.my_tokens)
        token = first.token_of('t', 'mail')
        assert token is not None and token % GROUP_SPAN == first.task_to_token('t')
        assert first.token_of('t') == first.task_to_token('t')
        assert third.token_of('t', 'mail') is None


def test_a_group_is_joined_and_left_while_the_node_runs(config: CoordinationConfig) -> None:
    released: list[TokenSet] = []
    with node(config, 'n1', on_release=released.append) as first, node(config, 'n2') as second:
        first.enroll(['mail'])
        eventually(lambda: shared('mail', first))
        second.enroll(['mail', 'other'])
        eventually(lambda: shared('mail', first, second) and shared('other', second))
        numbers = node_of(first).protocol.groups
        assert any(group_of(token) == numbers['mail'] for tokens in released for token in tokens)
        first.enroll([])
        eventually(lambda: not first.holds('mail'))
        assert share(first, 'mail') == set()
        eventually(lambda: shared('mail', second))
        second.enroll(['other'])
        eventually(lambda: not second.holds('mail') and 'mail' not in held(config))
        formed = 'SELECT name FROM "{}queue_group" WHERE formed'
        with node(config, 'n3'):  # its rows, which are nobody's, go with the next plan
            eventually(lambda: query(config, formed) == [('other',)])
        first.enroll(['mail'])
        eventually(lambda: shared('mail', first))


def test_what_a_member_that_goes_had_is_shared_by_the_others_of_its_group(
    config: CoordinationConfig,
) -> None:
    with node(config, 'n1', ['mail']) as first, node(config, 'n3') as third:
        with node(config, 'n2', ['mail']) as second:
            eventually(lambda: shared('mail', first, second))
        eventually(lambda: shared('mail', first))
        assert not third.holds('mail')


def test_what_a_node_that_was_evicted_wanted_it_wants_again(make_config: MakeConfig) -> None:
    config = make_config(heartbeat_interval_sec=0.3, heartbeat_timeout_sec=3.0)
    with node(config, 'n1') as first, node(config, 'n2', ['mail']) as second:
        second.enroll(['mail', 'fast'])
        eventually(lambda: shared('fast', second))
        query(config, """DELETE FROM "{}node" WHERE name = 'n2'""")
        eventually(lambda: second.get_coordination_status()['evictions'] == 1)
        eventually(lambda: shared('mail', second) and shared('fast', second), timeout=20)
        assert share(first, 'mail') == set()
        # a database that has forgotten which groups the row names
        query(config, """UPDATE "{}node" SET groups = array[]::text[] WHERE name = 'n2'""")
        eventually(
            lambda: (
                query(config, """SELECT groups FROM "{}node" WHERE name = 'n2'""")
                == [(['fast', 'mail'],)]
            ),
            timeout=20,
        )
        eventually(lambda: shared('mail', second) and shared('fast', second), timeout=20)


def test_a_lock_on_a_queue_counts_in_that_group_alone(config: CoordinationConfig) -> None:
    with (
        node(config, 'n1', ['mail', 'fast']) as first,
        node(config, 'n2', ['mail', 'fast']) as second,
    ):
        eventually(lambda: shared('mail', first, second) and shared('fast', first, second))
        mine = min(share(first, 'mail') & share(first, 'fast') & share(first, ''))
        second.register_lock(mine, 'n2', queue='mail')
        eventually(lambda: second.owns(mine, 'mail'))
        assert first.owns(mine, 'fast') and first.owns(mine)
        second.register_lock(mine, 'n2', queue='fast')
        eventually(lambda: second.owns(mine, 'fast'))
        assert first.owns(mine)
        assert [lock['queue'] for lock in first.list_locks()] == ['fast']
        second.register_lock(mine, 'n2')
        eventually(lambda: second.owns(mine) and second.owns(mine, 'mail'))


def test_forked_children_own_nothing_in_a_group_and_what_they_owned_in_the_plain_one(
    config: CoordinationConfig,
) -> None:
    with node(config, 'n1', ['mail']) as job:
        eventually(lambda: shared('mail', job) and shared('', job))
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            with contextlib.suppress(BaseException):
                os.write(writer, repr((job.owns('t', 'mail'), job.owns('t'))).encode())
            os._exit(0)
        os.waitpid(child, 0)
        assert os.read(reader, 100) == b'(False, True)'
        os.close(reader)
        os.close(writer)


@pytest.mark.parametrize('group', ['', 'x' * 256, 'a\0b', 7, '\ud800'])
def test_what_can_be_no_queue_is_no_group(config: CoordinationConfig, group: object) -> None:
    with pytest.raises(ConfigurationError, match='queue group'):
        node(config, 'n1', [group])  # type: ignore[list-item]
    with pytest.raises(ConfigurationError, match='names of queues'):
        Job('n1', config, groups='mail')
    with Job('n1') as job, pytest.raises(ConfigurationError, match='queue group'):
        job.register_locks_bulk([('t', 'n1', None, None, group)])
