"""A Job that stands in, below the workers of both frameworks: beyond what docs/TESTING.md shows."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import dramatiq
import pytest
from celery import Celery
from celery.contrib.testing.worker import start_worker
from dramatiq.brokers.stub import StubBroker
from dramatiq.middleware import AsyncIO
from dramatiq.results import Results
from dramatiq.results.backends import StubBackend

from jobsync_celery import JobSync as CelerySync
from jobsync_celery import exactly_once as celery_once
from jobsync_core import DuplicateExecution, ExecutionRunning, Job
from jobsync_core.errors import NotEntered
from jobsync_core.ledger.current import current_ledger
from jobsync_core.testing import FakeJob
from jobsync_dramatiq import JobSync as DramatiqSync
from jobsync_dramatiq import exactly_once as dramatiq_once

pytest_plugins = ['jobsync_core.testing']

#: Nobody listens there: whoever asks the database hangs or fails.
NOWHERE = 'postgresql://nobody@127.0.0.1:1/none'


class Stub:
    """A StubBroker with the plugin, its worker, and what its actors did."""

    def __init__(self) -> None:
        self.broker = StubBroker()
        self.broker.emit_after('process_boot')
        self.plugin = DramatiqSync(database_url=NOWHERE)
        self.broker.add_middleware(self.plugin)
        self.broker.add_middleware(Results(backend=StubBackend(), store_results=True))
        self.broker.add_middleware(AsyncIO())
        self.log: list[Any] = []
        self.worker: dramatiq.Worker | None = None

    def actor(self, function: Any, **options: Any) -> Any:
        settings: dict[str, Any] = {'max_retries': 0, **options}
        return dramatiq.actor(broker=self.broker, **settings)(function)

    def start(self) -> None:
        self.worker = dramatiq.Worker(self.broker, worker_timeout=50, worker_threads=4)
        self.worker.start()

    def stop(self) -> None:
        if self.worker is not None:
            self.worker.stop()
            self.worker = None


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stub]:
    made = Stub()
    monkeypatch.setattr(
        dramatiq.broker, 'global_broker', made.broker
    )  # whom messages ask for their results
    yield made
    made.stop()
    made.broker.close()


class TestDramatiq:
    def test_what_has_a_key_or_a_pin_runs_without_a_node(
        self, jobsync_job: FakeJob, stub: Stub
    ) -> None:
        keyed = stub.actor(lambda n: n + 1, actor_name='keyed', jobsync_key='k:{n}')
        pinned = stub.actor(lambda n: n + 2, actor_name='pinned', jobsync_pin=['gpu-%'])
        stub.start()
        messages = [keyed.send(1), pinned.send(1)]
        assert [message.get_result(block=True) for message in messages] == [2, 3]
        # It went as it would without the plugin.
        assert not [name for message in messages for name in message.options if 'jobsync' in name]
        assert {message.queue_name for message in messages} == {'default'}

    @pytest.mark.parametrize('affinity', [True, False])
    def test_affinity_makes_no_difference_there_and_in_direct_calls(
        self, jobsync_job: FakeJob, stub: Stub, affinity: bool
    ) -> None:
        @dramatiq_once(key='{n}', scope='s', affinity=affinity)
        def run(n: int) -> int:
            stub.log.append(n)
            return n + 1

        actor = stub.actor(run)
        stub.start()
        messages = [actor.send(3), actor.send(3)]
        assert [message.get_result(block=True) for message in messages] == [4, 4]
        assert [actor(3), actor(4), actor(4)] == [4, 5, 5]
        jobsync_job.ledger.hold('s:5')
        with pytest.raises(ExecutionRunning):
            actor(5)
        assert stub.log == [3, 4]
        assert not [name for message in messages for name in message.options if 'jobsync' in name]

    def test_the_plugin_shows_the_job_and_leaves_it_as_it_was(
        self, jobsync_job: FakeJob, stub: Stub
    ) -> None:
        stub.start()
        assert stub.plugin.job is jobsync_job
        stub.stop()
        assert jobsync_job.can_claim_task('a') and jobsync_job.am_i_healthy()

    def test_a_real_node_outlives_the_worker(self, jobsync_node: Job, stub: Stub) -> None:
        @dramatiq_once(key='{n}', scope='s')
        def run(n: int) -> int:
            stub.log.append(n)
            return n

        actor = stub.actor(run)
        stub.start()
        messages = [actor.send(3), actor.send(3)]
        assert [message.get_result(block=True) for message in messages] == [3, 3]
        stub.stop()
        assert stub.log == [3]
        assert jobsync_node.am_i_healthy() and len(jobsync_node.my_tokens) == 10_000

    def test_coroutines_too(self, jobsync_job: FakeJob, stub: Stub) -> None:
        @dramatiq_once(key='{n}', scope='a')
        async def run(n: int) -> int:
            await asyncio.sleep(0)
            stub.log.append(n)
            return n

        actor = stub.actor(run)
        stub.start()
        assert [message.get_result(block=True) for message in (actor.send(1), actor.send(1))] == [
            1,
            1,
        ]
        assert stub.log == [1]

    def test_a_failure_and_its_retry_are_two_attempts(
        self, jobsync_job: FakeJob, stub: Stub
    ) -> None:
        @dramatiq_once(key='{n}', scope='f')
        def run(n: int) -> int:
            stub.log.append(n)
            if len(stub.log) == 1:
                raise ValueError('once more')
            return n

        actor = stub.actor(run, max_retries=1, min_backoff=1, max_backoff=1)
        stub.start()
        assert actor.send(1).get_result(block=True) == 1
        assert jobsync_job.ledger.attempts('f:1') == 2

    def test_without_a_job_the_worker_needs_no_database_and_each_key_completes_once(
        self, stub: Stub
    ) -> None:
        """The usual fixture, in a project that has JobSync among its middleware:
        https://dramatiq.io/guide.html#unit-testing.
        """

        @dramatiq_once(key='{n}', scope='m')
        def run(n: int) -> int:
            stub.log.append((n, stub.plugin.job and stub.plugin.job.node_name))
            return n

        actor, pinned = (
            stub.actor(run),
            stub.actor(lambda: 7, actor_name='pinned', jobsync_pin=['gpu-%']),
        )
        for _ in range(2):  # each worker begins with an empty memory
            stub.start()
            assert [
                message.get_result(block=True)
                for message in (actor.send(1), actor.send(1), pinned.send())
            ] == [1, 1, 7]
            stub.stop()
        assert stub.log == [(1, 'stub'), (1, 'stub')]
        assert stub.plugin.job is None
        with pytest.raises(NotEntered):
            current_ledger()

    def test_a_job_that_is_entered_before_the_worker_s_fixture_or_after_it_counts(
        self, stub: Stub
    ) -> None:
        @dramatiq_once(key='{n}', scope='e')
        def run(n: int) -> int:
            return n

        actor = stub.actor(run)
        stub.start()
        with FakeJob() as job:
            assert actor.send(1).get_result(block=True) == 1
            assert job.ledger.completed == {'e:1': 1}
            assert stub.plugin.job is job
        assert actor.send(2).get_result(block=True) == 2


@pytest.fixture
def app() -> Iterator[Celery]:
    made = Celery('made', broker='memory://', backend='cache+memory://', set_as_current=False)
    CelerySync(made, database_url=NOWHERE)
    yield made
    made.close()


class TestCelery:
    def test_what_has_a_key_or_a_pin_runs_without_a_node(
        self, jobsync_job: FakeJob, app: Celery
    ) -> None:
        heads: list[dict[str, Any]] = []

        @app.task(jobsync_key='k:{n}', shared=False)  # type: ignore[untyped-decorator]  # celery has no types
        def keyed(n: int) -> int:
            return n + 1

        @app.task(bind=True, jobsync_pin=['gpu-%'], shared=False)  # type: ignore[untyped-decorator]
        def pinned(self: Any, n: int) -> int:
            heads.append(self.request.headers or {})
            return n + 2

        with start_worker(app, perform_ping_check=False):
            results = [keyed.delay(1), pinned.delay(1)]
            assert [result.get(timeout=10) for result in results] == [2, 3]
            assert CelerySync.of(app).job is jobsync_job  # type: ignore[union-attr]
        assert heads == [{}]
        assert jobsync_job.am_i_healthy() and jobsync_job.can_claim_task('a')

    @pytest.mark.parametrize('pool', ['solo', 'threads'])
    def test_duplicates_get_the_result_of_the_real_ledger(
        self, jobsync_node: Job, app: Celery, pool: str
    ) -> None:
        ran: list[int] = []
        lock = threading.Lock()

        @app.task(shared=False)  # type: ignore[untyped-decorator]
        @celery_once(key='{n}', scope='s')
        def square(n: int) -> int:
            with lock:
                ran.append(n)
            return n * n

        with start_worker(app, pool=pool, concurrency=2, perform_ping_check=False):
            first, second = square.delay(3), square.delay(3)
            assert (first.get(timeout=20), second.get(timeout=20)) == (9, 9)
        assert ran == [3]
        assert jobsync_node.am_i_healthy() and len(jobsync_node.my_tokens) == 10_000

    @pytest.mark.parametrize('affinity', [True, False])
    def test_affinity_makes_no_difference_there_and_in_direct_calls(
        self, jobsync_job: FakeJob, app: Celery, affinity: bool
    ) -> None:
        ran: list[int] = []

        @app.task(shared=False)  # type: ignore[untyped-decorator]
        @celery_once(key='{n}', scope='s', affinity=affinity)
        def run(n: int) -> int:
            ran.append(n)
            return n + 1

        with start_worker(app, perform_ping_check=False):
            results = [run.delay(3), run.delay(3)]
            assert [result.get(timeout=10) for result in results] == [4, 4]
        assert [run(3), run(4), run.apply((4,)).get()] == [4, 5, 5]
        jobsync_job.ledger.hold('s:5')
        with pytest.raises(ExecutionRunning):
            run(5)
        assert ran == [3, 4]

    def test_eager_tasks_are_answered_as_in_a_worker(
        self, jobsync_job: FakeJob, app: Celery
    ) -> None:
        app.conf.task_always_eager = True
        ran: list[str] = []

        def make(name: str, **options: Any) -> Any:
            def run(n: int) -> int:
                ran.append(f'{name}{n}')
                return n

            return app.task(name=name, shared=False)(
                celery_once(key='{n}', scope=name, **options)(run)
            )

        kept, skipped = make('kept'), make('skipped', on_duplicate='skip', on_running='skip')
        raising = make('raising', on_duplicate='raise')
        assert [kept.delay(1).get(), kept.delay(1).get(), kept.apply((1,)).get()] == [1, 1, 1]
        assert [skipped.delay(1).get(), skipped.delay(1).get()] == [1, None]
        assert raising.delay(1).get() == 1
        with pytest.raises(DuplicateExecution):
            raising.delay(1).get()
        jobsync_job.ledger.hold('kept:2')
        jobsync_job.ledger.hold('skipped:2')
        assert skipped.delay(2).get() is None
        with pytest.raises(ExecutionRunning):
            kept.delay(2).get()
        assert ran == ['kept1', 'skipped1', 'raising1']
