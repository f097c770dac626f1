"""JobSync: the middleware that makes a broker's worker processes nodes of a cluster."""

from __future__ import annotations

from typing import Any

from dramatiq.middleware import Middleware

from jobsync_core.errors import ConfigurationError
from jobsync_core.job import Job
from jobsync_core.worker.backlog import QueueCounter
from jobsync_core.worker.node_of_tests import node_of_tests
from jobsync_core.worker.node_status import node_status
from jobsync_core.worker.settings import PluginSettings

from .actors import OPTIONS, ActorOptions, check_actor, read_settings
from .broker.in_memory import InMemory, is_in_memory
from .broker.interface import WorkerBroker
from .broker.opening import open_counter
from .consumer import GatedConsumer, WatchedConsumer
from .errors import DeclarationRefused
from .gate import WorkerGate
from .hooks import check_broker
from .node import WorkerProcess, refuse_to_boot
from .once import processing
from .producer import Producer

__all__ = ['JobSync']


class JobSync(Middleware):
    """The plugin of one broker: `broker.add_middleware(JobSync(database_url='postgresql://…'))`,
    before actors are declared.

    Args:
        settings: Any setting of PluginSettings and CoordinationConfig. What is not given comes from
            Django's DRAMATIQ_JOBSYNC or JOBSYNC, and the environment (`JOBSYNC_…`). They are read
            when they are needed first.

    Attributes:
        gate: The gate of this process's worker; None where it is no node.
    """

    def __init__(self, **settings: Any) -> None:
        self._given = settings
        self._settings: PluginSettings | None = None
        self._broker: Any = None
        self._consume: Any = None
        self._producer: Producer | None = None
        self.gate: WorkerGate | None = None
        self._worker: WorkerProcess | InMemory | None = None

    @property
    def actor_options(self) -> Any:
        """Options of actors; Dramatiq asks for them when the middleware is added, right before it
        can see the broker.
        """
        return ActorOptions(OPTIONS)

    @property
    def job(self) -> Job | None:
        """This process's node; None where there is none. In tests the Job of `jobsync_core.testing`
        that stands in, and with a StubBroker one in memory.
        """
        return node_of_tests() or (self._worker.job if self._worker is not None else None)

    @property
    def settings(self) -> PluginSettings:
        """The settings; read at the first use.

        Raises:
            ConfigurationError: A setting cannot work.
        """
        if self._settings is None:
            self._settings = read_settings(self._given)
        return self._settings

    @property
    def producer(self) -> Producer:
        """What this process sends by.

        Raises:
            ConfigurationError: The plugin has not seen its broker yet.
        """
        if self._producer is None:
            raise ConfigurationError(
                'this JobSync has no broker with actors: name the module that declares them'
            )
        return self._producer

    def before_declare_actor(self, broker: Any, actor: Any) -> None:
        """The first time that the plugin sees its broker.

        Raises:
            DeclarationRefused: The actor, or the way in which the plugin was added, cannot work.
        """
        self._install(broker)
        check_actor(actor)

    def after_declare_actor(self, broker: Any, actor: Any) -> None:
        """Actors that were declared before the plugin was added count as well; Dramatiq 1 gives
        their names.
        """
        self._install(broker)
        check_actor(broker.actors[actor] if isinstance(actor, str) else actor)

    def after_declare_queue(self, broker: Any, queue_name: str) -> None:
        """A worker that runs begins to consume another queue, and to own keys in it."""
        if isinstance(self._worker, WorkerProcess):
            self._worker.add_queue(queue_name)

    def _install(self, broker: Any) -> None:
        check_broker(self._broker, broker, JobSync)
        if self._broker is broker:
            return
        self._broker = broker
        # Ahead of whoever looks at a message's queue, or counts what runs.
        broker.middleware.remove(self)
        broker.middleware.insert(0, self)
        self._producer = producer = Producer(broker, lambda: self.settings)
        self._consume = broker.consume
        broker.enqueue, broker.consume = producer.enqueue, self._consumer_of

    def _consumer_of(self, queue_name: str, prefetch: int = 1, timeout: int = 5000) -> Any:
        if self.gate is not None:
            return GatedConsumer(
                self.gate,
                queue_name,
                lambda: self.producer.broker.consume(queue_name, prefetch, timeout),
            )
        consumer = self._consume(queue_name, prefetch, timeout)
        consuming = self._worker.consuming if self._worker is not None else None
        return WatchedConsumer(consumer, queue_name, consuming) if consuming else consumer

    def before_worker_boot(self, broker: Any, worker: Any) -> None:
        """Become a node, before any queue is consumed."""
        try:
            self._install(broker)
            if node_of_tests() is not None:
                return  # a test's worker is no node
            if is_in_memory(broker):
                self._worker = InMemory(broker)
                return
            self._worker = process = WorkerProcess(self.settings, self.producer, broker)
            self.gate = process.boot(worker)
        # whatever the user's own settings and callbacks raise, too: Dramatiq would log it and go on
        except Exception as error:
            settings = self._settings
            ends = settings is None or settings.required or isinstance(error, DeclarationRefused)
            begun = self._worker if isinstance(self._worker, WorkerProcess) else None
            refuse_to_boot(error, begun, required=ends)

    def before_worker_shutdown(self, broker: Any, worker: Any) -> None:
        """Give the tokens away while actors end."""
        if self._worker is not None:
            self._worker.drain()

    def after_worker_shutdown(self, broker: Any, worker: Any) -> None:
        """Leave; survivors take over what is left in the node's queue."""
        worker, self._worker, self.gate = self._worker, None, None
        if worker is not None:
            worker.leave()

    def before_process_message(self, broker: Any, message: Any) -> None:
        """The last look before the actor runs."""
        if self.gate is not None:
            self.gate.begin(message)
        processing.set((broker, message))

    def after_process_message(
        self,
        broker: Any,
        message: Any,
        *,
        result: Any = None,
        exception: BaseException | None = None,
    ) -> None:
        """The actor has ended."""
        processing.set(None)
        if self.gate is not None:
            self.gate.end(message)

    def after_skip_message(self, broker: Any, message: Any) -> None:
        """The actor did not run, or ended by SkipMessage."""
        self.after_process_message(broker, message)

    def evacuable(self) -> WorkerBroker:
        """The broker, for `jobsync evacuate --app MODULE:NAME`, where that is this object. Its
        actors are declared by then.

        Raises:
            ConfigurationError: The broker is neither of Redis nor of RabbitMQ, or there is none.
        """
        broker = self.producer.broker
        broker.begin_evacuation()
        return broker

    def countable(self) -> QueueCounter:
        """The broker, for `jobsync backlog` and `jobsync purge`.

        Raises:
            ConfigurationError: The broker is neither of Redis nor of RabbitMQ, or there is none.
        """
        _ = self.producer  # one without a broker is refused here
        return open_counter(self._broker, self.settings.config.appname)

    def local_status(self) -> dict[str, Any]:
        """The node as it sees itself, as plain values."""
        job = self.job
        if job is None:
            return {'coordination_enabled': False}
        if self._worker is not None:
            return self._worker.status(job)
        return node_status(job, consuming=False, messages={})
