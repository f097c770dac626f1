"""Workers that consume different home queues, and change them while they run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from jobsync_core import ConfigurationError, CoordinationConfig
from jobsync_core.cli.doctor import examine
from jobsync_core.cli.status_view import snapshot
from jobsync_core.store.sessions import Sessions
from jobsync_core.store.tables import Tables
from jobsync_core.worker.inbox import Received
from jobsync_core.worker.lookup import OwnerLookup
from jobsync_core.worker.node import WorkerNode
from jobsync_core.worker.routing import node_queue, old_node_queue, parked_queue
from jobsync_core.worker.settings import PluginSettings
from tests.server.worker.test_node import Stage
from tests.support.cluster import query
from tests.support.fake_broker import Item
from tests.support.waiting import eventually

ROUTES = [f'order-{number}' for number in range(40)]


@pytest.fixture
def stage(config: CoordinationConfig) -> Iterator[Stage]:
    with ExitStack() as stack:
        yield Stage(config, stack)


def owned(node: WorkerNode, home: str) -> set[str]:
    """What a node owns of the routes of a home queue."""
    job, group = node.job, node.gate.group_of(home)
    return {route for route in ROUTES if job is not None and job.owns(route, group)}


def shared(home: str, *nodes: WorkerNode) -> bool:
    """Whether these nodes own all routes of a home queue, each of them some."""
    parts = [owned(node, home) for node in nodes]
    return all(parts) and sum(map(len, parts)) == len(ROUTES)


def put(stage: Stage, queue: str, home: str, *routes: str) -> None:
    with stage.contents.lock:
        items = [Item(route, home) for route in routes]
        stage.contents.queues.setdefault(queue, []).extend(items)


def test_only_nodes_that_consume_a_queue_own_its_keys(stage: Stage) -> None:
    light, heavy = stage.entered('n1', homes=('light',)), stage.entered('n2', homes=('heavy',))
    both = stage.entered('n3', homes=('light', 'heavy'))
    eventually(lambda: shared('light', light, both) and shared('heavy', heavy, both), 30)
    assert not owned(light, 'heavy') and not owned(heavy, 'light')
    settings = PluginSettings(config=stage.config)
    lookup = OwnerLookup(lambda: settings, lambda: None)
    theirs = {lookup.queue_of(route, 'heavy') for route in ROUTES}
    assert theirs == {heavy.queues['heavy'], both.queues['heavy']}
    assert lookup.queue_of(ROUTES[0], 'nobody') is None


def test_a_queue_that_is_added_is_owned_after_it_is_consumed(stage: Stage) -> None:
    first, second = stage.entered('n1', homes=('mail', 'gpu')), stage.entered('n2', homes=('mail',))
    eventually(lambda: shared('mail', first, second) and shared('gpu', first), 30)
    consumed: list[str] = []

    def ready(queue: str) -> None:
        assert not owned(second, 'gpu')
        consumed.append(queue)

    second.add_home('gpu', ready)
    eventually(lambda: shared('gpu', first, second), 30)
    assert consumed == [node_queue('gpu', stage.config.appname, 'n2')]
    assert second.queues['gpu'] == consumed[0] and 'declare gpu' in stage.log


def test_a_queue_that_is_dropped_is_consumed_until_all_of_it_is_given_away(stage: Stage) -> None:
    first, second = stage.entered('n1', homes=('gpu',)), stage.entered('n2', homes=('gpu', 'mail'))
    eventually(lambda: shared('gpu', first, second), 30)
    queue, ended = second.queues['gpu'], list[bool]()

    def done(given: str) -> None:
        assert given == queue
        ended.append(not owned(second, 'gpu'))

    put(stage, queue, 'gpu', *ROUTES)
    second.drop_home('gpu', done)
    eventually(lambda: ended == [True] and shared('gpu', first), 30)
    eventually(lambda: 'gpu' not in second.queues)
    # What is left in the node's queue for it is brought to those that own it now.
    eventually(lambda: stage.contents.routes(first.queues['gpu']) == sorted(ROUTES), 30)
    assert owned(second, 'mail'), 'the other queue goes on'


def test_what_the_last_consumer_leaves_goes_home(stage: Stage) -> None:
    other, last = stage.entered('n1', homes=('mail',)), stage.entered('n2', homes=('mail', 'gpu'))
    eventually(lambda: shared('mail', other, last) and shared('gpu', last), 30)
    put(stage, last.queues['gpu'], 'gpu', *ROUTES)
    ended: list[str] = []
    last.drop_home('gpu', ended.append)
    eventually(lambda: ended and stage.contents.routes('gpu') == sorted(ROUTES), 30)
    settings = PluginSettings(config=stage.config)
    lookup = OwnerLookup(lambda: settings, lambda: None)
    assert lookup.queue_of('order-1', 'gpu') is None, 'producers send home'


def test_a_node_that_comes_back_with_fewer_queues_leaves_the_others(stage: Stage) -> None:
    before = stage.entered('n1', homes=('mail', 'gpu'))
    put(stage, before.queues['gpu'], 'gpu', 'a')
    before.leave()
    now = stage.entered('n1', homes=('mail',), comes_back=True)
    eventually(lambda: stage.contents.routes('gpu') == ['a'], 30)
    assert now.job is not None and now.job.am_i_healthy()


def test_the_queues_of_the_old_layout_are_handed_out(stage: Stage) -> None:
    app = stage.config.appname
    with ExitStack():
        first = stage.entered('n1', homes=('mail',))
    for node in ('gone', 'n1'):
        put(stage, old_node_queue(app, node), 'mail', f'of {node}')
        query(
            stage.config,
            """INSERT INTO "{}queue" (name, node, kind) VALUES (%s, %s, 'celery')""",
            (old_node_queue(app, node), node),
        )
    put(stage, parked_queue('', app), 'mail', 'parked')
    first.leave()
    second = stage.entered('n1', homes=('mail',))
    eventually(
        lambda: stage.contents.routes(second.queues['mail']) == ['of gone', 'of n1', 'parked'], 30
    )


def test_a_pin_that_no_consumer_of_the_queue_matches_is_parked_by_the_producer(
    stage: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    node = stage.entered('n1', homes=('mail',))
    eventually(lambda: shared('mail', node), 30)
    settings = PluginSettings(config=stage.config)
    lookup = OwnerLookup(lambda: settings, lambda: None, {'render': ['gpu-%']}.get)
    parked = parked_queue('mail', stage.config.appname)
    assert {lookup.queue_of(f'render#{slot}', 'mail') for slot in range(64)} == {parked}
    assert caplog.text.count("matches its pin 'gpu-%'") == 1
    gpu = stage.entered('gpu-1', homes=('mail',), pins={'render': ['gpu-%']})
    eventually(lambda: shared('mail', node, gpu), 30)
    eventually(
        lambda: (
            {lookup.queue_of(f'render#{slot}', 'mail') for slot in range(64)}
            == {gpu.queues['mail']}
        ),
        30,
    )


def test_a_pin_keeps_no_other_key_from_a_queue_that_its_node_does_not_consume(stage: Stage) -> None:
    """With few tokens each of them has a virtual key of the pinned task."""
    gpu = stage.entered('gpu-1', homes=('gpu',), pins={'render': ['gpu-%']})
    cpu = stage.entered('cpu-1', homes=('mail',), pins={'render': ['gpu-%']})
    eventually(lambda: shared('gpu', gpu) and shared('mail', cpu), 30)
    received = [
        Received(cpu.gate.job.incarnation, f'render#{slot}', home='mail') for slot in range(64)
    ]
    outcomes = [cpu.gate.place(delivery, 0.0) for delivery in received]
    assert {outcome.queue for outcome in outcomes} == {cpu.gate.rules.parked('mail')}
    assert {gpu.gate.here(f'render#{slot}', 'gpu').mine for slot in range(64)} == {True}


def test_a_worker_that_would_divide_a_group_does_not_start(stage: Stage) -> None:
    groups = {'fast': ['high', 'low']}
    with pytest.raises(ConfigurationError, match="consumes 'high' and not 'low'"):
        stage.node(homes=('high',), queue_groups=groups)
    node = stage.entered(homes=('high', 'low'), queue_groups=groups)
    eventually(lambda: shared('high', node) and shared('low', node))
    assert node.gate.group_of('low') == 'fast'


def test_workers_that_group_a_queue_in_different_ways_are_told_of(
    stage: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    one = stage.entered('n1', homes=('high', 'low'))
    assert 'queue_groups' not in caplog.text
    shared_ring = {'fast': ['high', 'low']}
    two = stage.entered('n2', homes=('high', 'low'), queue_groups=shared_ring)
    said = [record.message for record in caplog.records if 'queue_groups' in record.message]
    assert len(said) == 2, 'a line for each queue, of the newer node'
    assert all('node=n2' in line and 'docs/QUEUES.md' in line for line in said)
    assert "the queue 'high' is in the group 'fast' for n2 and 'high' for n1" in said[0]
    sessions = Sessions(stage.config, 'test')
    with sessions.session() as connection:
        found = snapshot(connection, Tables.of(stage.config))['disagreements']
        assert len(found) == 2 and "'low'" in found[1]
    sessions.close_all()
    (check,) = [check for check in examine(stage.config) if check.name == 'queue groups']
    assert check.verdict == 'warn' and "'high'" in check.found and 'order' in check.remedy
    one.leave()
    (check,) = [check for check in examine(stage.config) if check.name == 'queue groups']
    assert check.verdict == 'ok'
    caplog.clear()
    three = stage.entered('n3', homes=('high', 'low'), queue_groups=shared_ring)
    eventually(lambda: shared('high', two, three), 30)
    assert 'queue_groups' not in caplog.text
