"""A gate between a worker and a broker that are none: what happened, in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import dramatiq
from dramatiq.broker import MessageProxy
from dramatiq.brokers.stub import StubBroker
from dramatiq.worker import _WorkerThread

from jobsync_core.config import CoordinationConfig
from jobsync_core.worker.consuming import Consuming
from jobsync_core.worker.gate import Gate
from jobsync_core.worker.owners import Place
from jobsync_core.worker.routing import HOME, HOPS, KEY
from jobsync_core.worker.settings import PluginSettings
from jobsync_dramatiq import JobSync, exactly_once
from jobsync_dramatiq.consumer import GatedConsumer
from jobsync_dramatiq.gate import WorkerGate
from jobsync_dramatiq.hooks import attach
from tests.support.fakes import Clock, FakeJob, FakeOwners

__all__ = ['Stage', 'message', 'stage']


class FakeConsumer:
    """The broker's consumer: what it is asked for is in the log."""

    def __init__(self, log: list[str], queue: str) -> None:
        self.queue = queue
        self._log = log
        self.messages: deque[Any] = deque()
        self.ack_error: Exception | None = None
        self.idles = 0

    def next(self, patient: bool) -> Any:
        return self.messages.popleft() if self.messages else None

    def idle(self, seconds: float) -> None:
        self.idles += 1

    def ack(self, message: Any) -> None:
        if self.ack_error is not None:
            raise self.ack_error
        self._log.append('ack')

    def nack(self, message: Any) -> None:
        self._log.append(f'nack {message.queue_name}')

    def requeue(self, message: Any, begun: bool = False) -> None:
        self._log.append('requeue begun' if begun else 'requeue')

    def pause(self) -> None:
        self._log.append('pause')

    def resume(self) -> None:
        self._log.append('resume')

    def close(self, waiting: list[Any]) -> None:
        self._log.append(f'close waiting={len(waiting)}')


class Stage:
    """The gate and what is around it.

    Attributes:
        log: What happened: 'ack', 'nack QUEUE', 'requeue', 'run' (the actor), 'send QUEUE hops=N',
            'stray', 'pause', 'resume'.
        middleware: Names of the signals that another middleware has heard of messages, in order.
    """

    def __init__(self, clock: Clock, settings: dict[str, Any], queue: str) -> None:
        self.log: list[str] = []
        self.middleware: list[str] = []
        self.clock = clock
        self.job, self.owners = FakeJob(), FakeOwners()
        self.send_error: Exception | None = None
        self.broker = StubBroker()
        config = CoordinationConfig(appname='shop_')
        self.plugin = JobSync(config=config, **settings)
        self.broker.add_middleware(self.plugin)
        self.broker.add_middleware(_Ears(self.middleware))
        actors: dict[str, dict[str, Any]] = {
            'keyed': {'jobsync_key': '{n}'},
            'plain': {},
            'pinned': {'jobsync_pin': ['gpu-%'], 'jobsync_key': '{n}'},
        }
        for name, options in actors.items():
            dramatiq.actor(actor_name=name, broker=self.broker, **options)(self._run)
        dramatiq.actor(actor_name='once', broker=self.broker)(exactly_once(key='{n}')(self._run))
        anywhere = exactly_once(key='{n}', affinity=False)(self._run_anywhere)
        dramatiq.actor(actor_name='anywhere', broker=self.broker)(anywhere)
        core: Any = Gate(PluginSettings(config=config, **settings), self.job)  # type: ignore[arg-type]  # all that it needs
        core.owners = self.owners
        self.counts: dict[str, int] = core.counts
        worker_broker: Any = SimpleNamespace(send=self._send)
        self.consuming = Consuming(10)
        self.plugin.gate = self.gate = WorkerGate(
            core,
            worker_broker,
            self.plugin.producer.actors,
            self.consuming,
            lambda home: self.log.append('stray'),
            clock.now,
        )
        attach(self.broker, self.gate)
        self.source = FakeConsumer(self.log, queue)
        self.consumer = GatedConsumer(self.gate, queue, lambda: self.source)

    def _run(self, n: int) -> None:
        self.log.append('run')

    def _run_anywhere(self, n: int) -> None:
        self.log.append('run')

    def _send(
        self, message: Any, queue: str, route: str | None, hops: int = 0, source: object = None
    ) -> None:
        if self.send_error is not None:
            raise self.send_error
        self.log.append(f'send {queue} hops={hops}')

    def receive(self, found: Any) -> Any:
        """A message comes from the broker; what the worker gets of it."""
        self.source.messages.append(MessageProxy(found))
        return next(self.consumer)

    def look(self, seconds: float = 0.1) -> Any:
        """The worker asks for the next message some time later; what it gets."""
        self.clock.time += seconds
        return next(self.consumer)

    def process(self, found: Any) -> list[str]:
        """A thread of the worker takes up what the consumer gave; what happened then."""
        self.log.clear()
        consumers: Any = {found.queue_name: SimpleNamespace(post_process_message=self._settle)}
        work: Any = SimpleNamespace(task_done=lambda: None)
        thread = _WorkerThread(
            broker=self.broker, consumers=consumers, work_queue=work, worker_timeout=1
        )
        thread.process_message(found)
        return self.log

    def _settle(self, found: Any) -> None:
        kind = 'nack' if found.failed else 'ack'
        self.broker.emit_before(kind, found)
        getattr(self.consumer, kind)(found)
        self.broker.emit_after(kind, found)


class _Ears(dramatiq.Middleware):
    def __init__(self, heard: list[str]) -> None:
        self._heard = heard

    def before_process_message(self, broker: Any, message: Any) -> None:
        self._heard.append('begin')

    def after_process_message(
        self,
        broker: Any,
        message: Any,
        *,
        result: Any = None,
        exception: BaseException | None = None,
    ) -> None:
        self._heard.append('end')

    def after_skip_message(self, broker: Any, message: Any) -> None:
        self._heard.append('skip')

    def after_ack(self, broker: Any, message: Any) -> None:
        self._heard.append('ack')


def message(key: str | None, hops: Any = None, actor: str = 'keyed', **options: Any) -> Any:
    """A message of this key as it comes from the queue of node n1, or without hops from its actor's
    own.
    """
    if key is not None:
        options = {KEY: key, **options}
    if hops is not None:
        options = {HOPS: hops, HOME: 'default', **options}
    args = options.pop('args', (7 if key is None else key,))
    return dramatiq.Message(
        queue_name='default' if hops is None else 'default.jobsync.shop_.n1',
        actor_name=actor,
        args=args,
        kwargs={},
        options=options,
    )


@contextmanager
def stage(queue: str = 'default.jobsync.shop_.n1', **settings: Any) -> Iterator[Stage]:
    """A gate whose node is `n1`; `n2` has the queue `q2`, and owns the route 'other'."""
    clock = Clock()
    made = Stage(clock, settings, queue)
    made.job.mine.add('mine')
    made.owners.places.update(
        other=Place('n2', 'q2'), mine=Place('n1', 'q1'), self=Place('n1', 'q1')
    )
    yield made
