"""Everything that a Celery message can be behaves on a cluster as it does without one."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone

import pytest
from celery import chain, chord, group, uuid

from tests.support.waiting import eventually

from .celery_adapter import CeleryAdapter
from .harness import STEADY, Cluster
from .history import moment
from .setups import Setup, setups

#: Every test works on numbers of its own: keys are remembered as long as the cluster lives.
_numbers = itertools.count(1000, 1000)


@pytest.fixture
def start() -> int:
    return next(_numbers)


@pytest.fixture(scope='module', params=setups(framework='celery'), ids=str)
def cluster(
    request: pytest.FixtureRequest, make_lasting_cluster: Callable[..., Cluster]
) -> Iterator[Cluster]:
    setup: Setup = request.param
    made = make_lasting_cluster(setup, STEADY, pins=['pinned', 'preferred'])
    made.start('alpha', 'gpu-1', 'gpu-2', concurrency=3)
    yield made
    made.finish()
    made.close()


@pytest.fixture
def celery(cluster: Cluster) -> CeleryAdapter:
    assert isinstance(cluster.adapter, CeleryAdapter)
    return cluster.adapter


@pytest.mark.parametrize('task', ['flaky', 'retrying'])
def test_a_retry_is_another_attempt_of_the_same_message(
    cluster: Cluster, start: int, task: str
) -> None:
    messages = [cluster.send(task, start + i, 2, routed=i % 2 == 0) for i in range(6)]
    for i, message in enumerate(messages):
        assert cluster.result(message) == {'n': start + i, 'attempt': 2}
    attempts = list(cluster.notes.of('start', [f'f:{start}']))
    assert [(note.message, note.more) for note in attempts] == [
        (messages[0], attempt) for attempt in range(3)
    ]


def test_a_delayed_message_waits_for_its_time(cluster: Cluster, start: int) -> None:
    due = moment() + 1.5
    for i in range(6):
        cluster.send('keyed', start + i, delay=1.5, routed=i % 2 == 0)
    keys = [f'k:{start + i}' for i in range(6)]
    cluster.wait_ended(keys)
    # Celery's countdown has whole milliseconds.
    assert min(note.at for note in cluster.notes.of('start', keys)) >= due - 0.05


def test_an_expired_message_does_not_run(cluster: Cluster, start: int) -> None:
    messages = [
        cluster.send('keyed', start + i, fate='dropped', delay=1.2, expires=0.5, routed=i % 2 == 0)
        for i in range(6)
    ]
    assert {cluster.outcome(message).state for message in messages} == {'revoked'}
    assert not cluster.notes.of('start', [f'k:{start + i}' for i in range(6)])


def test_a_revoked_message_does_not_run(
    cluster: Cluster, celery: CeleryAdapter, start: int
) -> None:
    messages = [
        cluster.send('keyed', start + i, fate='dropped', delay=5, routed=i % 2 == 0)
        for i in range(6)
    ]
    celery.app.control.revoke(messages)
    assert {cluster.outcome(message).state for message in messages} == {'revoked'}
    assert not cluster.notes.of('start', [f'k:{start + i}' for i in range(6)])


@pytest.mark.parametrize('routed', [False, True], ids=['by the gate', 'by the sender'])
def test_workflows_complete_with_the_right_results(
    cluster: Cluster, celery: CeleryAdapter, start: int, routed: bool
) -> None:
    tasks = (celery.routing if routed else celery.app).tasks
    add, total, seal = tasks['add'], tasks['total'], tasks['seal']
    tag = str(start)

    in_chord = chord([add.s(start, i, tag=tag) for i in range(12)], total.s(tag=tag)).apply_async()
    in_chain = chain(
        add.s(1, 1, tag=tag), add.s(2, tag=tag), add.s(3, tag=tag), seal.s(tag=f'chain {tag}')
    ).apply_async()
    in_group = group(add.s(i, i, tag=f'group {tag}') for i in range(10)).apply_async()
    linked = add.apply_async((20, 22, tag), link=seal.s(tag=f'link {tag}'), task_id=uuid())

    assert cluster.result(in_chord.id) == 12 * start + sum(range(12))
    assert cluster.result(in_chain.id) == 7
    assert [cluster.result(child.id) for child in in_group.children] == [2 * i for i in range(10)]
    assert cluster.result(linked.id) == 42
    cluster.wait_ended([f'c:link {tag}', f'c:chain {tag}', f't:{tag}'])
    for key in (
        f'c:link {tag}',
        f'c:chain {tag}',
        f't:{tag}',
        *(f'a:{tag}:{start}:{i}' for i in range(12)),
    ):
        assert len(cluster.ended(key)) == 1, key
        cluster.expect(key)


def test_workflows_with_duplicates_in_them_complete(
    cluster: Cluster, celery: CeleryAdapter, start: int
) -> None:
    add, total, seal = (celery.app.tasks[name] for name in ('add', 'total', 'seal'))
    tag = f'again {start}'
    for i in range(4):
        assert cluster.result(add.apply_async((start, i, tag)).id) == start + i
    in_chord = chord([add.s(start, i, tag=tag) for i in range(8)], total.s(tag=tag)).apply_async()
    in_chain = chain(add.s(start, 0, tag=tag), seal.s(tag=tag)).apply_async()
    assert cluster.result(in_chord.id) == 8 * start + sum(range(8))
    assert cluster.result(in_chain.id) == start
    for i in range(8):
        assert len(cluster.ended(f'a:{tag}:{start}:{i}')) == 1


def test_a_failure_calls_its_errback_and_fails_its_chord(
    cluster: Cluster, celery: CeleryAdapter, start: int
) -> None:
    tasks = celery.app.tasks
    message = cluster.send('sour', start, fate='failed', link_error=tasks['seal_error'].s())
    outcome = cluster.outcome(message)
    assert outcome.state == 'failed'
    assert 'cannot work' in str(outcome.value)
    cluster.wait_ended([f'e:{message}'])
    header = [tasks['add'].s(start, 1, tag='sour'), tasks['sour'].s(start + 1)]
    in_chord = chord(header, tasks['total'].s(tag=f'sour {start}')).apply_async()
    assert cluster.outcome(in_chord.id).state == 'failed'
    assert not cluster.notes.of('start', [f't:sour {start}'])


def test_a_failed_key_may_be_tried_again_by_another_message(cluster: Cluster, start: int) -> None:
    message = cluster.send('flaky', start, 99)
    assert cluster.outcome(message).state == 'failed'
    assert cluster.result(cluster.send('flaky', start, 0)) == {'n': start, 'attempt': 0}


def test_forwarding_keeps_all_that_a_message_has(
    cluster: Cluster, celery: CeleryAdapter, start: int
) -> None:
    expires = datetime.now(timezone.utc) + timedelta(hours=1)
    options = {
        'priority': 3,
        'headers': {'x-tenant': 'acme', 'x-number': 7},
        'reply_to': 'somewhere',
        'expires': expires,
        'shadow': 'a shadow',
        'time_limit': 500,
        'soft_time_limit': 400,
        'link': celery.app.tasks['seal'].s(tag=f'seen {start}'),
        'compression': 'gzip',
        'ignore_result': False,
    }
    seen = []
    # From a sender without JobSync about two of three have to be forwarded.
    for i in range(18):
        message = celery.send(
            'reveal', (start + i, 'text', [1, {'two': 3}]), kwargs={'named': None}, **options
        )
        found = cluster.result(message)
        assert found.pop('args')[0] == start + i
        assert found.pop('root_id') == message
        assert found.pop('correlation_id') == message
        assert str(start + i) in found.pop('argsrepr')
        assert found['headers'].pop('x-tenant') == 'acme'
        assert found['headers'].pop('x-number') == 7
        assert found['priority'] == 3
        assert found['reply_to'] == 'somewhere'
        assert found['timelimit'] == [500, 400]
        assert found['links'] == ['seal']
        assert datetime.fromisoformat(found['expires']) == expires
        seen.append({**found, 'headers': None})
    nodes = {item.pop('node') for item in seen}
    hops = {item.pop('hops') for item in seen}
    assert len(nodes) == 3
    assert len(hops) > 1, 'nothing was forwarded'
    assert all(item == seen[0] for item in seen)


def test_a_sender_with_jobsync_routes_to_the_owner(
    cluster: Cluster, celery: CeleryAdapter, start: int
) -> None:
    stable = cluster.stable()
    found = [cluster.result(celery.send('reveal', (start + i,), routed=True)) for i in range(12)]
    owners = cluster.ledger.owners(f'v:{start + i}' for i in range(12))
    assert [item['node'] for item in found] == [owners[f'v:{start + i}'] for i in range(12)]
    assert {item['hops'] for item in found} <= {None, 0}
    stable.check_owners('k', least=0)


def test_duplicates_get_the_stored_result(cluster: Cluster, start: int) -> None:
    first = cluster.result(cluster.send('body', start))
    again = [cluster.send('body', start, routed=i % 2 == 0) for i in range(6)]
    assert [cluster.result(message) for message in again] == [first] * 6
    assert len(cluster.ended(f'b:{start}')) == 1


def test_a_duplicate_waits_for_a_result_that_comes_after_the_commit(
    cluster: Cluster, start: int
) -> None:
    first = cluster.send('late', start, 2.0)
    cluster.wait_ended([f't:{start}'])
    again = [cluster.send('late', start, routed=i % 2 == 0) for i in range(3)]
    expected = {'n': start, 'message': first}
    assert [cluster.result(message) for message in (first, *again)] == [expected] * 4
    assert len(cluster.ended(f't:{start}')) == 1


def test_duplicates_sent_at_once_run_once(cluster: Cluster, start: int) -> None:
    messages = [cluster.send('body', start, 0.5, routed=i % 2 == 0) for i in range(6)]
    assert len({str(cluster.result(message)) for message in messages}) == 1
    assert len(cluster.ended(f'b:{start}')) == 1


def test_a_message_that_comes_twice_is_acknowledged_and_not_replayed(
    cluster: Cluster, celery: CeleryAdapter, start: int
) -> None:
    link = celery.app.tasks['seal'].s(tag=f'twice {start}')
    message = cluster.send('body', start, task_id=uuid(), link=link)
    cluster.result(message)
    cluster.wait_ended([f'c:twice {start}'])
    cluster.send('body', start, task_id=message, link=link)
    cluster.send('body', start + 1)
    cluster.finish()
    assert len(cluster.ended(f'b:{start}')) == 1
    assert len(cluster.ended(f'c:twice {start}')) == 1


def test_without_a_key_each_message_is_its_own(cluster: Cluster, start: int) -> None:
    messages = [cluster.send('by_id', start) for _ in range(4)]
    assert [cluster.result(message) for message in messages] == [start] * 4
    assert {note.message for note in cluster.ended(f'i:{start}')} == set(messages)


def test_pinned_tasks_run_where_they_are_pinned_and_spread_over_those_nodes(
    cluster: Cluster, start: int
) -> None:
    messages = [cluster.send('pinned', start + i, routed=i % 2 == 0) for i in range(30)]
    assert {cluster.result(message) for message in messages} == {'gpu-1@test', 'gpu-2@test'}


def test_a_pin_falls_back_in_order(cluster: Cluster, start: int) -> None:
    messages = [cluster.send('preferred', start + i, routed=i % 2 == 0) for i in range(12)]
    assert {cluster.result(message) for message in messages} <= {'gpu-1@test', 'gpu-2@test'}


def test_a_rate_limit_holds_and_loses_nothing(cluster: Cluster, start: int) -> None:
    since = moment()
    numbers = cluster.numbers('alpha', 10, start, 'limited')
    for n in numbers:
        cluster.send('limited', n)
    keys = [f'b:{n}' for n in numbers]
    cluster.wait_ended(keys)
    # 20 a second on one node: the first comes at once.
    assert max(note.at for note in cluster.notes.of('start', keys)) - since > 0.4
    assert len(cluster.ended(*keys)) == 10


def test_a_task_over_its_time_limit_fails_and_its_key_is_free_again(
    cluster: Cluster, start: int
) -> None:
    if cluster.pool != 'prefork':
        pytest.skip('time limits need the prefork pool')
    for task, n, error in (
        ('overdue', start, 'TimeLimitExceeded'),
        ('overdue_softly', start + 1, 'SoftTimeLimitExceeded'),
    ):
        outcome = cluster.outcome(cluster.send(task, n, 30, fate='failed'))
        assert outcome.state == 'failed'
        assert type(outcome.value).__name__ == error
        assert cluster.result(cluster.send(task, n, 0)) == n


def test_tasks_without_a_key_pass_untouched(cluster: Cluster, start: int) -> None:
    messages = [cluster.send('plain', start + i) for i in range(20)]
    assert [cluster.result(message) for message in messages] == [start + i for i in range(20)]


def test_nothing_is_left_at_the_broker_afterwards(cluster: Cluster) -> None:
    cluster.finish()
    eventually(lambda: not cluster.left())
