"""Everything that a Dramatiq message can be behaves on a cluster as it does without one."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import dramatiq
import pytest

from tests.support.waiting import eventually

from .dramatiq_adapter import DramatiqAdapter
from .harness import STEADY, Cluster
from .history import moment
from .setups import Setup, setups

#: Every test works on numbers of its own: keys are remembered as long as the cluster lives.
_numbers = itertools.count(1000, 1000)
both_ways = pytest.mark.parametrize('routed', [False, True], ids=['by the gate', 'by the sender'])


@pytest.fixture
def start() -> int:
    return next(_numbers)


@pytest.fixture(scope='module', params=setups('processes', framework='dramatiq'), ids=str)
def cluster(
    request: pytest.FixtureRequest, make_lasting_cluster: Callable[..., Cluster]
) -> Iterator[Cluster]:
    setup: Setup = request.param
    made = make_lasting_cluster(setup, STEADY, pins=['pinned', 'preferred'])
    made.start('alpha', 'gpu-1', 'gpu-2', concurrency=4)
    yield made
    made.finish()
    made.close()


@pytest.fixture
def adapter(cluster: Cluster) -> DramatiqAdapter:
    assert isinstance(cluster.adapter, DramatiqAdapter)
    return cluster.adapter


@pytest.mark.parametrize('task', ['flaky', 'retrying'])
def test_a_retry_is_another_attempt_of_the_same_message(
    cluster: Cluster, start: int, task: str
) -> None:
    messages = [cluster.send(task, start + i, 2, routed=i % 2 == 0) for i in range(6)]
    for i, message in enumerate(messages):
        assert cluster.result(message) == {'n': start + i, 'attempt': 2}
    attempts = cluster.notes.of('start', [f'f:{start}'])
    assert [(note.message, note.more) for note in attempts] == [
        (messages[0], attempt) for attempt in range(3)
    ]


def test_when_its_retries_are_used_up_a_message_has_failed_and_its_key_is_free(
    cluster: Cluster, start: int
) -> None:
    message = cluster.send('flaky', start, 99, max_retries=2)
    outcome = cluster.outcome(message)
    assert outcome.state == 'failed'
    assert 'attempt 2' in str(outcome.value)
    assert len(cluster.notes.of('start', [f'f:{start}'])) == 3
    assert cluster.result(cluster.send('flaky', start, 0)) == {'n': start, 'attempt': 0}


def test_a_delayed_message_waits_for_its_time_and_runs_on_its_owner(
    cluster: Cluster, start: int
) -> None:
    stable = cluster.stable()
    due = moment() + 1.5
    for i in range(6):
        cluster.send('keyed', start + i, delay=1.5, routed=i % 2 == 0)
    keys = [f'k:{start + i}' for i in range(6)]
    cluster.wait_ended(keys)
    # Dramatiq's delays are whole milliseconds of the system's clock.
    assert min(note.at for note in cluster.notes.of('start', keys)) >= due - 0.05
    stable.check_owners('k')


def test_a_message_that_is_too_old_does_not_run(cluster: Cluster, start: int) -> None:
    messages = [
        cluster.send('keyed', start + i, fate='dropped', delay=1.2, max_age=500, routed=i % 2 == 0)
        for i in range(6)
    ]
    assert {cluster.outcome(message).state for message in messages} == {'revoked'}
    assert not cluster.notes.of('start', [f'k:{start + i}' for i in range(6)])


def test_an_actor_over_its_time_limit_fails_and_its_key_is_free_again(
    cluster: Cluster, start: int
) -> None:
    messages = [
        cluster.send('overdue', start + i, 30, fate='failed', routed=i == 0) for i in range(2)
    ]
    for i, message in enumerate(messages):
        outcome = cluster.outcome(message)
        assert outcome.state == 'failed'
        assert 'TimeLimitExceeded' in str(outcome.value)
        assert cluster.result(cluster.send('overdue', start + i, 0)) == start + i


@both_ways
def test_a_group_of_sixty_calls_back_once_when_all_are_done(
    cluster: Cluster, adapter: DramatiqAdapter, start: int, routed: bool
) -> None:
    tag = str(start)
    group = adapter.group(tag, range(start, start + 60), routed).run()
    sums = [cluster.result(adapter.remember(message)) for message in group.children]
    assert sums == [2 * n for n in range(start, start + 60)]
    cluster.wait_ended([f'c:{tag}'])
    for n in range(start, start + 60):
        cluster.expect(f'a:{tag}:{n}:{n}')
    cluster.expect(f'c:{tag}')
    cluster.finish()
    assert len(cluster.ended(f'c:{tag}')) == 1
    assert len(cluster.ended(*(f'a:{tag}:{n}:{n}' for n in range(start, start + 60)))) == 60
    # It is called when the last has ended, not before.
    assert cluster.ended(f'c:{tag}')[0].at >= max(
        note.at for note in cluster.notes.read() if note.key.startswith(f'a:{tag}:')
    )


@both_ways
def test_a_pipeline_of_three_steps_hands_its_results_on(
    cluster: Cluster, adapter: DramatiqAdapter, start: int, routed: bool
) -> None:
    pipelines = [adapter.steps(f'{start + i}', [start + i, 20, 3], routed).run() for i in range(6)]
    for i, pipeline in enumerate(pipelines):
        values = [cluster.result(adapter.remember(message)) for message in pipeline.messages]
        assert values == [start + i, start + i + 20, start + i + 23]
        for key in (
            f'a:{start + i}:{start + i}:0',
            f'a:{start + i}:20:{start + i}',
            f'a:{start + i}:3:{start + i + 20}',
        ):
            assert len(cluster.ended(key)) == 1
            cluster.expect(key)


def test_pipelines_within_a_group_complete(
    cluster: Cluster, adapter: DramatiqAdapter, start: int
) -> None:
    app = adapter.routing
    children = [adapter.steps(f'in {start + i}', [start + i, 1, 1], routed=True) for i in range(5)]
    group = dramatiq.group(children, broker=app.broker)
    group.add_completion_callback(app.actors['seal'].message(None, tag=f'in {start}'))
    group.run()
    cluster.wait_ended([f'c:in {start}'])
    assert [cluster.result(adapter.remember(child.messages[-1])) for child in children] == [
        start + i + 2 for i in range(5)
    ]
    assert len(cluster.ended(f'c:in {start}')) == 1


def test_workflows_with_duplicates_in_them_complete(
    cluster: Cluster, adapter: DramatiqAdapter, start: int
) -> None:
    tag = f'again {start}'
    add = adapter.app.actors['add']
    for n in range(start, start + 4):
        assert cluster.result(adapter.remember(add.send(n, n, tag))) == 2 * n
    group = adapter.group(tag, range(start, start + 8)).run()
    assert [cluster.result(adapter.remember(message)) for message in group.children] == [
        2 * n for n in range(start, start + 8)
    ]
    cluster.wait_ended([f'c:{tag}'])
    pipeline = adapter.steps(f'pipe {start}', [start, 1]).run()
    assert cluster.result(adapter.remember(pipeline.messages[-1])) == start + 1
    again = adapter.steps(f'pipe {start}', [start, 1]).run()
    assert cluster.result(adapter.remember(again.messages[-1])) == start + 1
    for n in range(start, start + 8):
        assert len(cluster.ended(f'a:{tag}:{n}:{n}')) == 1
    assert len(cluster.ended(f'a:pipe {start}:1:{start}')) == 1


def test_success_and_failure_callbacks_are_called(
    cluster: Cluster, adapter: DramatiqAdapter, start: int
) -> None:
    cluster.send('body', start, on_success='told')
    cluster.send('sour', start, fate='failed', on_failure='told')
    cluster.wait_ended([f'd:body {start}', f'd:sour {start}'])
    cluster.settle()
    assert len(cluster.ended(f'd:body {start}')) == 1
    assert len(cluster.ended(f'd:sour {start}')) == 1


def test_the_sender_fetches_results_by_its_own_message(
    cluster: Cluster, adapter: DramatiqAdapter, start: int
) -> None:
    for routed in (False, True):
        app = adapter.sender(routed)
        for i in range(6):
            message = app.actors['body'].send(start + 10 * routed + i)
            assert message.queue_name == 'second'
            assert (
                message.get_result(backend=app.results, block=True, timeout=20_000)['n']
                == start + 10 * routed + i
            )


def test_coroutines_run_once_and_have_results(cluster: Cluster, start: int) -> None:
    messages = [cluster.send('awaited', start + i, 0.1, routed=i % 2 == 0) for i in range(8)]
    messages += [cluster.send('awaited', start + i, 0.1, routed=i % 2 == 1) for i in range(8)]
    results = [cluster.result(message) for message in messages]
    assert results[:8] == results[8:]
    assert [result['n'] for result in results[:8]] == list(range(start, start + 8))
    assert len(cluster.ended(*(f'w:{start + i}' for i in range(8)))) == 8


def test_forwarding_keeps_all_that_a_message_has(
    cluster: Cluster, adapter: DramatiqAdapter, start: int
) -> None:
    options = {
        'x_tenant': 'acme',
        'x_number': 7,
        'max_age': 500_000,
        'time_limit': 400_000,
        'max_retries': 3,
        'min_backoff': 77,
    }
    seen = []
    # From a sender without JobSync most have to be forwarded.
    for i in range(18):
        sent = adapter.app.actors['reveal'].send_with_options(
            args=(start + i, 'text', [1, {'two': 3}]), kwargs={'named': None}, **options
        )
        found = cluster.result(adapter.remember(sent))
        assert found.pop('args') == [start + i, 'text', [1, {'two': 3}]]
        assert found.pop('message_timestamp') == sent.message_timestamp
        assert {name: found['options'].get(name) for name in options} == options
        found.pop('pid')
        seen.append(found)
    nodes = {item.pop('node') for item in seen}
    own = {name for item in seen for name in item.pop('options') if name not in options}
    assert len(nodes) >= 3
    # What the plugin and the broker need for themselves is all that was added.
    assert {name for name in own if not name.startswith(('jobsync_', 'redis_'))} == set()
    assert (
        seen == [{'queue_name': 'second', 'actor_name': 'reveal', 'kwargs': {'named': None}}] * 18
    )


def test_a_sender_with_jobsync_routes_to_the_owner(
    cluster: Cluster, adapter: DramatiqAdapter, start: int
) -> None:
    stable = cluster.stable()
    found = [cluster.result(adapter.send('reveal', (start + i,), routed=True)) for i in range(12)]
    owners = cluster.ledger.owners(f'v:{start + i}' for i in range(12))
    assert [item['node'] for item in found] == [owners[f'v:{start + i}'] for i in range(12)]
    assert {item['options'].get('jobsync_hops', 0) for item in found} == {0}
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


def test_without_a_key_each_message_is_its_own(cluster: Cluster, start: int) -> None:
    messages = [cluster.send('by_id', start) for _ in range(4)]
    assert [cluster.result(message) for message in messages] == [start] * 4
    assert {note.message for note in cluster.ended(f'i:{start}')} == set(messages)


def test_pinned_actors_run_where_they_are_pinned_and_spread_over_those_nodes(
    cluster: Cluster, start: int
) -> None:
    messages = [cluster.send('pinned', start + i, routed=i % 2 == 0) for i in range(30)]
    ran = {cluster.result(message) for message in messages}
    assert {cluster.worker_of(node) for node in ran} == {'gpu-1', 'gpu-2'}
    assert len(ran) == sum(cluster[name].nodes for name in ('gpu-1', 'gpu-2'))


def test_a_pin_falls_back_in_order(cluster: Cluster, start: int) -> None:
    messages = [cluster.send('preferred', start + i, routed=i % 2 == 0) for i in range(12)]
    assert {cluster.worker_of(cluster.result(message)) for message in messages} <= {
        'gpu-1',
        'gpu-2',
    }


@both_ways
def test_urgent_messages_overtake_patient_ones(cluster: Cluster, start: int, routed: bool) -> None:
    # All on one node: its threads are busy, and what it has taken meanwhile waits in the order of
    # priorities.
    node = next(
        node for node in sorted(cluster.ledger.owned()) if cluster.worker_of(node) == 'alpha'
    )
    owners = cluster.ledger.owners(f'b:{n}' for n in range(start, start + 400))
    mine = [int(key[2:]) for key, owner in owners.items() if owner == node]
    threads = 4 // cluster['alpha'].nodes
    # Dramatiq takes twice as many messages as it has threads.
    busy, patient, urgent = (
        mine[:threads],
        mine[10 : 10 + threads // 2],
        mine[20 : 20 + threads // 2],
    )
    for n in busy:
        cluster.send('body', n, 3.0 if n == busy[0] else 5.0, routed=routed)
    cluster.wait_started([f'b:{n}' for n in busy])
    for n in patient:
        cluster.send('patient', n, 0.2, routed=routed)
    for n in urgent:
        cluster.send('body', n, 0.2, routed=routed)
    cluster.wait_ended(f'b:{n}' for n in (*patient, *urgent))
    begun = {note.key: note.at for note in cluster.notes.of('start')}
    assert max(begun[f'b:{n}'] for n in urgent) < min(begun[f'b:{n}'] for n in patient)


def test_actors_without_a_key_pass_untouched(cluster: Cluster, start: int) -> None:
    messages = [cluster.send('plain', start + i) for i in range(20)]
    assert [cluster.result(message) for message in messages] == [start + i for i in range(20)]


def test_nothing_is_left_at_the_broker_afterwards(cluster: Cluster) -> None:
    cluster.finish()
    eventually(lambda: not cluster.left())
