"""The node of a worker process, from its start to its end, with a broker in memory."""

from __future__ import annotations

import contextlib
import json
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest

from jobsync_core import CoordinationConfig, DatabaseUnavailable, Job
from jobsync_core.errors import LockNotAvailable
from jobsync_core.worker.lookup import OwnerLookup
from jobsync_core.worker.node import Framework, WorkerNode
from jobsync_core.worker.node_status import node_status
from jobsync_core.worker.settings import PluginSettings
from tests.support.brokers import free_port
from tests.support.cluster import query
from tests.support.fake_broker import Contents, FakeBroker, Item
from tests.support.ledger_process import connect
from tests.support.proxy import Mode, Proxy
from tests.support.waiting import eventually


class NodeBroker(FakeBroker):
    """A broker that a node can enter with."""

    place = 'memory://test'

    def identify(self, make: bool) -> str | None:
        return 'mark'


class Stage:
    """Workers of one cluster and one broker."""

    def __init__(self, config: CoordinationConfig, stack: ExitStack) -> None:
        self.config = config
        self.contents = Contents()
        self.log: list[object] = []
        #: Why the workers take no messages.
        self.problem = ''
        self._stack = stack

    def node(
        self,
        name: str = 'n1',
        *,
        homes: tuple[str, ...] = ('home',),
        comes_back: bool = False,
        **settings: Any,
    ) -> WorkerNode:
        broker = NodeBroker(self.contents)
        found = {'config': self.config, **settings}
        made = WorkerNode(
            PluginSettings(**found),
            name,
            Framework(
                kind='celery',
                broker=broker,
                homes=homes,
                declare=lambda queues: self.log.extend(f'declare {home}' for home in queues),
                tasks=lambda: ['known'],
                pins=found.get('pins', {}),
                busy=lambda tokens: False,
                problem=lambda: self.problem,
                silence=lambda: 0.0,
                patience=5.0,
                on_lease=self.log.append,
                comes_back=comes_back,
            ),
        )
        broker.on_restore = lambda node: self.log.append(f'restore {node}')
        self._stack.callback(made.leave)
        return made

    def entered(self, name: str = 'n1', **options: Any) -> WorkerNode:
        made = self.node(name, **options)
        made.enter()
        made.start()
        return made


@pytest.fixture
def stage(config: CoordinationConfig) -> Iterator[Stage]:
    with ExitStack() as stack:
        yield Stage(config, stack)


def fetch(port: int, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f'http://127.0.0.1:{port}{path}', timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def ready(port: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(fetch(port, '/health/ready')[1])
    return found


def test_a_node_lives_from_enter_to_leave(stage: Stage) -> None:
    node = stage.entered()
    job = node.job
    assert job is not None and node.queues == {'home': f'home.jobsync.{stage.config.appname}.n1'}
    eventually(lambda: len(job.my_tokens) == stage.config.total_tokens)
    stage.contents.put(node.gate.rules.parked('home'), 'a')
    node.parked_something('home')
    eventually(lambda: stage.contents.order(node.queues['home']) == ['a'])
    status = node.status(job, waiting=2)
    assert status['messages'] == {'released': 1, 'waiting': 2} and status['consuming'] is True
    assert json.loads(json.dumps(status)) == status, 'plain values'
    node.drain()
    eventually(lambda: job.local_status()['state'] == 'draining')
    node.leave()
    assert node.job is None and not query(stage.config, 'SELECT name FROM "{}node"')
    node.leave()


class TestAWorkerThatCannotTakeMessagesYet:
    """It has entered by a thread of its own, and waits."""

    def started(self, stage: Stage) -> WorkerNode:
        node = stage.node()

        def enter() -> None:
            node.enter(waits=True)
            node.start()

        self.thread = threading.Thread(target=enter, daemon=True)
        self.thread.start()
        eventually(lambda: node.registered)
        return node

    def entered(self) -> None:
        self.thread.join(30)
        assert not self.thread.is_alive()

    @pytest.fixture
    def other(self, stage: Stage) -> Job:
        """A node that owns everything."""
        job = stage.entered('n2').job
        assert job is not None
        eventually(lambda: len(job.my_tokens) == stage.config.total_tokens)
        stage.log.clear()
        return job

    @pytest.fixture
    def node(self, stage: Stage, other: Job) -> Iterator[WorkerNode]:
        node = self.started(stage)
        yield node
        node.give_up()
        self.entered()

    def test_owns_nothing_though_its_queue_is_known_and_made(
        self, stage: Stage, node: WorkerNode, other: Job
    ) -> None:
        assert stage.log == ['declare home']
        found = query(stage.config, """SELECT node FROM "{}node_queue" WHERE home = 'home'""")
        assert sorted(found) == [('n1',), ('n2',)]
        assert self.states(stage) == {'n1': 'joining', 'n2': 'active'}
        third = stage.entered('n3').job
        assert third is not None
        eventually(lambda: len(third.my_tokens) == stage.config.total_tokens // 2)
        assert len(other.my_tokens) == len(third.my_tokens)

    def test_owns_its_share_as_soon_as_it_can(self, stage: Stage, node: WorkerNode) -> None:
        node.take_part()
        self.entered()
        assert node.job is not None
        assert len(node.job.my_tokens) == stage.config.total_tokens // 2

    def test_does_not_keep_for_long_what_the_first_plan_gave_it(self, stage: Stage) -> None:
        node = self.started(stage)
        total = stage.config.total_tokens
        other = stage.entered('n2').job
        assert other is not None and len(other.my_tokens) == total // 2
        eventually(lambda: len(other.my_tokens) == total, 30)
        assert self.states(stage) == {'n1': 'draining', 'n2': 'active'}
        node.take_part()
        eventually(lambda: len(other.my_tokens) == total // 2, 30)
        assert self.states(stage) == {'n1': 'active', 'n2': 'active'}
        self.entered()

    def test_makes_its_queue_again_where_it_was_taken_for_dead_meanwhile(
        self, stage: Stage, node: WorkerNode
    ) -> None:
        assert node.job is not None
        job, life = node.job, node.job.incarnation
        query(stage.config, """DELETE FROM "{}node_queue" WHERE node = 'n1'""")
        query(stage.config, """DELETE FROM "{}node" WHERE name = 'n1'""")
        eventually(lambda: job.incarnation != life and 'n1' in self.states(stage), 20)
        node.take_part()
        self.entered()
        assert stage.log.count('declare home') >= 2
        found = query(stage.config, """SELECT home FROM "{}node_queue" WHERE node = 'n1'""")
        assert ('home',) in found

    def test_leaves_when_it_is_given_up(self, stage: Stage, node: WorkerNode) -> None:
        node.drain()  # there is nothing to give away
        node.give_up()
        self.entered()
        node.leave()
        assert self.states(stage) == {'n2': 'active'}

    @staticmethod
    def states(stage: Stage) -> dict[str, str]:
        return dict(query(stage.config, 'SELECT name, state FROM "{}node"'))


def test_a_name_that_comes_back_restores_what_its_former_life_had_taken(stage: Stage) -> None:
    stage.contents.held['n1'] = [Item('a')]
    stage.entered(comes_back=True)
    assert stage.log == ['declare home', 'restore n1'] and stage.contents.order('home') == ['a']


def test_one_that_does_not_leaves_it_to_the_others(stage: Stage) -> None:
    stage.entered()
    assert stage.log == ['declare home']


def test_with_the_lease_back_the_queue_is_made_again_before_the_worker_hears_of_it(
    stage: Stage, config: CoordinationConfig, make_config: Callable[..., CoordinationConfig]
) -> None:
    with Proxy(config.host, int(config.port)) as proxy:
        behind = make_config(host=proxy.host, port=proxy.port, connect_timeout_sec=1)
        node = stage.entered(config=behind, comes_back=True)
        stage.log.clear()
        proxy.switch(Mode.HOLD)
        eventually(lambda: stage.log == [False], 30)
        assert node.ready() == {
            'consuming': False,
            'lease': False,
            'coordinated': True,
            'node': 'n1',
            'groups': {'home': 0},
            'reason': 'no lease',
        }
        proxy.switch(Mode.PASS)
        eventually(lambda: True in stage.log, 30)
        assert stage.log == [False, 'restore n1', 'declare home', True]


class TestHttp:
    def test_probes_are_answered_from_before_the_worker_joins_until_it_has_left(
        self, stage: Stage
    ) -> None:
        port = free_port()
        node = stage.node(http=f'127.0.0.1:{port}')
        node.serve()
        assert fetch(port, '/health/live')[0] == 200
        assert (fetch(port, '/health/ready')[0], ready(port)['reason']) == (503, 'no lease')
        node.enter()
        node.start()
        tokens = stage.config.total_tokens
        eventually(lambda: ready(port).get('groups') == {'home': tokens})
        assert ready(port) == {
            'status': 'ready',
            'consuming': True,
            'lease': True,
            'coordinated': True,
            'node': 'n1',
            'groups': {'home': tokens},
        }
        stage.problem = 'stopped'
        assert (fetch(port, '/health/ready')[0], ready(port)['reason']) == (503, 'stopped')
        node.leave()
        with pytest.raises(OSError):
            fetch(port, '/health/live')

    def test_several_processes_have_ports_that_follow_each_other(self, stage: Stage) -> None:
        port = free_port()
        node = stage.node(http=f'127.0.0.1:{port - 1}')
        node.serve(1)
        assert fetch(port, '/health/live')[0] == 200

    def test_where_none_is_wanted_there_is_none(self, stage: Stage) -> None:
        stage.node().serve()


class TestWithoutCoordination:
    def test_it_answers_probes_is_no_node_and_says_so(
        self, stage: Stage, caplog: pytest.LogCaptureFixture
    ) -> None:
        port = free_port()
        node = stage.node(http=f'127.0.0.1:{port}', required=False)
        node.serve()
        node.go_uncoordinated('no database', 'jobsync_required')
        assert node.job is None and not node.coordinated
        assert ready(port) == {
            'status': 'ready',
            'consuming': True,
            'lease': False,
            'coordinated': False,
            'node': 'n1',
        }
        assert 'no database -- THIS WORKER RUNS WITHOUT COORDINATION' in caplog.text
        node.leave()
        with pytest.raises(OSError):
            fetch(port, '/health/live')

    def test_what_it_had_entered_it_leaves(self, stage: Stage) -> None:
        node = stage.node(required=False)
        node.enter()
        node.go_uncoordinated('the rest failed', 'required')
        assert not query(stage.config, 'SELECT name FROM "{}node"')

    def test_it_does_not_wait_for_a_database(self, stage: Stage) -> None:
        away = replace(stage.config, port=str(free_port()))
        node = stage.node(config=away, required=False, wait_for_database_sec=60.0)
        with pytest.raises(DatabaseUnavailable):
            node.wait_for_database(lambda: None)


def test_a_node_that_has_not_sent_a_heartbeat_says_none(config: CoordinationConfig) -> None:
    status = node_status(Job('n1', config), consuming=False, messages={})
    assert status['last_heartbeat'] is None


class TestLookup:
    def test_a_producer_finds_the_queue_of_the_owner(self, stage: Stage) -> None:
        node = stage.entered()
        settings = PluginSettings(config=stage.config)
        lookup = OwnerLookup(lambda: settings, lambda: None)
        eventually(lambda: lookup.queue_of('order-1', 'home') == node.queues['home'])
        quiet = replace(settings, route_producers=False)
        assert OwnerLookup(lambda: quiet, lambda: None).queue_of('order-1', 'home') is None

    def test_a_node_that_ends_does_not_ask(self, stage: Stage) -> None:
        node = stage.entered('n1')
        settings = PluginSettings(config=stage.config)
        lookup = OwnerLookup(lambda: settings, lambda: node.job)
        eventually(lambda: lookup.queue_of('order-1', 'home') == node.queues['home'])
        node.hurry()
        assert lookup.queue_of('order-1', 'home') is None

    def test_a_node_without_a_lease_does_not_ask(self, stage: Stage) -> None:
        settings = PluginSettings(config=stage.config)
        job = Job('n9', stage.config)
        assert not job.has_lease
        lookup = OwnerLookup(lambda: settings, lambda: job)
        owners: Any = object()  # that nobody can ask
        lookup.use(owners)
        assert lookup.queue_of('order-1', 'home') is None


@pytest.mark.parametrize(
    'table', ['node_queue', 'queue', 'lock', 'node', 'cluster', 'assignment', 'queue_group']
)
def test_a_worker_waits_for_a_table_that_somebody_has_locked_as_for_the_database(
    stage: Stage, table: str, caplog: pytest.LogCaptureFixture
) -> None:
    stage.entered('first').leave()  # the tables are there
    with contextlib.closing(connect(stage.config)) as dba:
        dba.autocommit = False
        with dba.cursor() as cursor:
            cursor.execute(f'LOCK TABLE "{stage.config.appname}{table}"')
        node = stage.node(pins={'known': ['n%']})

        def start() -> None:
            node.wait_for_database(lambda: None)
            node.enter()
            entered.append(True)

        entered: list[bool] = []
        starting = threading.Thread(target=start)
        starting.start()
        starting.join(8)  # what a statement may take at most is over
        assert starting.is_alive() and not entered
        dba.rollback()
        starting.join(30)
    assert entered
    waiting = [line for line in caplog.messages if 'waiting for it, for 60 s at most' in line]
    assert len(waiting) == 1 and f'has locked {stage.config.appname}{table}' in waiting[0]


def test_it_waits_no_longer_than_for_the_database(stage: Stage) -> None:
    stage.entered('first').leave()
    with contextlib.closing(connect(stage.config)) as dba:
        dba.autocommit = False
        with dba.cursor() as cursor:
            cursor.execute(f'LOCK TABLE "{stage.config.appname}node_queue"')
        node = stage.node(wait_for_database_sec=1.0)
        with pytest.raises(LockNotAvailable, match='has locked'):
            node.wait_for_database(lambda: None)
