"""A gate between a consumer, a pool and a broker that are none: what happened, in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from billiard.einfo import ExceptionWithTraceback
from celery import Celery
from celery.worker import state

from jobsync_celery import exactly_once
from jobsync_celery.broker.queues import Queues
from jobsync_celery.gate.gate import ConsumerGate
from jobsync_celery.settings import CelerySettings
from jobsync_celery.tasks.coordinated import Tasks, watch_tasks
from jobsync_core import clock as core_clock
from jobsync_core.config import CoordinationConfig
from jobsync_core.worker.gate import Gate
from jobsync_core.worker.owners import Place
from jobsync_core.worker.routing import HOPS, KEY
from tests.support.fakes import Clock, FakeJob, FakeOwners

__all__ = ['Bench', 'Message', 'bench']


class Message:
    """A message of protocol 2."""

    body = b'[[7], {}, {}]'
    content_type, content_encoding = 'application/json', 'utf-8'

    def __init__(self, key: str | None, hops: int | None = None, task: str = 'keyed') -> None:
        self.state = ''
        self.headers: dict[str, Any] = {'id': 'm1', 'task': task}
        if key is not None:
            self.headers[KEY] = key
        if hops is not None:
            self.headers[HOPS] = hops
        # A route is made from the arguments.
        self.payload: Any = ([7 if key is None else key], {}, {})
        self.properties: dict[str, Any] = {}
        self.delivery_info: dict[str, Any] = {}

    @property
    def acknowledged(self) -> bool:
        return bool(self.state)

    def ack_log_error(self, logger: Any, errors: Any) -> None:
        self.state = 'ack'

    def reject_log_error(self, logger: Any, errors: Any, requeue: bool = False) -> None:
        self.state = 'requeue' if requeue else 'reject'


class Request:
    """What the strategy makes of a message."""

    def __init__(self, stage: Bench, message: Message) -> None:
        self._stage, self.message, self.id, self.name, self.acknowledged = (
            stage,
            message,
            'm1',
            message.headers['task'],
            False,
        )

    def on_success(self, *_: Any) -> None:
        """It has run."""

    def on_accepted(self, *_: Any) -> None:
        """The pool begins it."""
        self._stage.log.append('accepted')

    on_timeout = on_success

    def on_failure(self, exc_info: Any, *_: Any, **__: Any) -> None:
        """It has failed. Celery raises a MemoryError again, before it acknowledges."""
        error = getattr(exc_info, 'exception', None)
        if isinstance(
            getattr(error, 'exc', error) if isinstance(error, ExceptionWithTraceback) else error,
            MemoryError,
        ):
            raise MemoryError
        self._stage.log.append(f'failed {error!r}')

    def acknowledge(self) -> None:
        self._stage.log.append('ack')

    def reject(self, requeue: bool) -> None:
        self.acknowledged = True
        self._stage.log.append('requeue' if requeue else 'reject')


class Bench:
    """The gate and what is around it.

    Attributes:
        log: What happened: 'ack', 'requeue', 'run' (the strategy), 'pool', 'send QUEUE hops=N',
            'stray'.
    """

    def __init__(self, clock: Clock, settings: dict[str, Any], slots: bool = False) -> None:
        self.log: list[str] = []
        self.clock = clock
        self.job, self.owners = FakeJob(), FakeOwners()
        self.is_node = True
        self.publish_error: Exception | None = None
        self.ack_error: Exception | None = None
        self.timers: list[Callable[[], object]] = []
        self.pool: Any = SimpleNamespace()
        self.pool_error: Exception | None = None
        self.app = Celery(
            'bench', broker='memory://', backend='cache+memory://', set_as_current=False
        )
        watch_tasks(self.app)
        self.app.task(name='keyed', shared=False, jobsync_key='{n}')(_task)
        self.app.task(name='plain', shared=False)(_task)
        self.app.task(name='once', shared=False)(exactly_once(key='{n}')(_task))
        anywhere = exactly_once(key='{n}', affinity=False)(_anywhere)
        self.app.task(name='anywhere', shared=False)(anywhere)
        config = CoordinationConfig(appname='shop_')
        self.settings = CelerySettings(config=config, **settings)
        core: Any = Gate(self.settings, self.job)  # type: ignore[arg-type]  # all that it needs
        core.owners = self.owners
        self.counts: dict[str, int] = core.counts
        self.consumer = SimpleNamespace(
            on_task_request=self._process_task_sem if slots else self._process_task,
            controller=self,
            call_soon=lambda call, *args: self.log.append('slot freed'),
            connection=SimpleNamespace(connected=True),
            on_unknown_task=lambda *args: self.log.append('discarded'),
            strategies={},
            connection_errors=(OSError,),
            channel_errors=(),
            update_strategies=lambda: None,
            create_task_handler=lambda: lambda message: self.handle(message),
            on_decode_error=None,
            on_invalid_task=None,
            on_unknown_message=None,
            timer=SimpleNamespace(call_after=lambda seconds, call: self.timers.append(call)),
            event_dispatcher=SimpleNamespace(enabled=False),
        )
        self.handle: Callable[[Message], object] = lambda message: None
        self.strategy_error: Exception | None = None
        self.strategy_errors: Iterator[Exception | None] = iter(())
        self.tasks = Tasks(self.app, self.settings)
        forwarder: Any = SimpleNamespace(send=self._send)
        self.gate = ConsumerGate(
            self.app,
            self.consumer,
            core,
            self.tasks,
            Queues(self.app, 'memory', 'shop_'),
            forwarder,
            is_node=lambda: self.is_node,
            on_parked=lambda home: self.log.append('stray'),
        )

    def _process_task(self, request: Any) -> None:
        if self.pool_error is not None:
            raise self.pool_error
        self.log.append('pool')

    def _process_task_sem(self, request: Any) -> None:
        self.log.append('slot taken')
        self._process_task(request)

    def _quick_release(self) -> None:
        """A slot of the pool is free."""

    def _send(self, queue: str, message: Message, headers: dict[str, Any]) -> None:
        if self.publish_error is not None:
            raise self.publish_error
        self.log.append(f'send {queue} hops={headers[HOPS]}')

    def receive(self, message: Message) -> list[str]:
        """A message comes from the broker; what happened then."""

        def strategy(*_: Any) -> None:
            error = next(self.strategy_errors, self.strategy_error)
            if error is not None:
                raise error
            self.log.append('run')

        def ack(*_: Any) -> None:
            if self.ack_error is not None:
                raise self.ack_error
            self.log.append('ack')

        self.consumer.strategies[message.headers['task']] = strategy
        self.consumer.strategies[message.headers['task']](
            message,
            None,
            ack,
            lambda log, errors, requeue: self.log.append('requeue' if requeue else 'reject'),
            [],
        )
        if message.state:
            self.log.append(message.state)
        return self.log

    def dispatch(self, message: Message) -> list[str]:
        """The strategy hands a request to the pool; what happened then."""
        self.log.clear()
        self.request = Request(self, message)
        self.consumer.on_task_request(self.request)
        return self.log

    def look(self, seconds: float = 0.1) -> list[str]:
        """The timer goes off, some time later."""
        self.clock.time += seconds
        timers, self.timers[:] = list(self.timers), []
        for call in timers:
            call()
        return self.log


def _task(n: int) -> None:
    """A task."""


def _anywhere(n: int) -> None:
    """A task that runs where it is taken."""


@contextmanager
def bench(monkeypatch: Any, slots: bool = False, **settings: Any) -> Iterator[Bench]:
    """A gate whose node is `n1`; `n2` has the queue `q2`, and owns the route 'other'. With slots
    the pool has processes.
    """
    clock = Clock()
    monkeypatch.setattr(core_clock, 'now', clock.now)
    monkeypatch.setattr(state, 'task_ready', lambda request: None)
    made = Bench(clock, settings, slots)
    made.app.backend.forget('m1')  # the memory is all apps'
    made.job.mine.add('mine')
    made.owners.places.update(
        other=Place('n2', 'q2'), mine=Place('n1', 'q1'), self=Place('n1', 'q1')
    )
    yield made
