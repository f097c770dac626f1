"""Bootsteps: a worker is a node from before its consumer starts until after its last task has
ended.
"""

from __future__ import annotations

from typing import Any

import celery
from celery import bootsteps
from celery.exceptions import WorkerShutdown
from celery.worker import state

from jobsync_core.errors import DatabaseUnavailable, JobSyncError
from jobsync_core.worker.node_of_tests import node_of_tests

from .cold_shutdown import ColdShutdown
from .entering import Entry, KeepAlive
from .hooks import WorkerHooks
from .logs import get_logger

__all__ = ['GateStep', 'NodeStep', 'ReadyStep']

logger = get_logger(__name__)

_EX_FAILURE = 1
#: What a consumer has before it takes messages. Celery orders steps by what they require, and by
#: chance else; the last one, of Celery 5.5, declares more than a hundred things at RabbitMQ.
_BEFORE = (
    'tasks:Tasks',
    'control:Control',
    'gossip:Gossip',
    'heart:Heart',
    'agent:Agent',
    *(['delayed_delivery:DelayedDelivery'] if celery.VERSION[:2] >= (5, 5) else ()),
)


class NodeStep(bootsteps.StartStopStep):  # type: ignore[misc]  # celery has no types
    """Makes the Job before the pool forks, begins to enter it after."""

    requires = ('celery.worker.components:Pool',)

    def __init__(
        self,
        parent: Any,
        jobsync_node: str | None = None,
        jobsync_weight: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(parent, **options)
        hooks = WorkerHooks.of(parent.app)
        assert hooks is not None
        self._hooks = hooks
        self._cold: ColdShutdown | None = None
        self.enabled = node_of_tests() is None  # a test's worker is no node
        if self.enabled:
            try:
                hooks.prepare_worker(parent, jobsync_node, jobsync_weight)
            except JobSyncError as error:
                logger.critical('JobSync: %s', error)
                raise WorkerShutdown(_EX_FAILURE) from error

    def start(self, parent: Any) -> None:
        """Register the node; it owns nothing before `ReadyStep`."""
        try:
            self._enter(parent)
        except BaseException as error:
            # No step's stop() runs for a worker that did not start.
            parent.pool.terminate()
            if not isinstance(error, Exception):
                raise
            logger.critical('JobSync: %s', error)
            raise WorkerShutdown(_EX_FAILURE) from error

    def _enter(self, parent: Any) -> None:
        hooks, node = self._hooks, self._hooks.node
        node.serve()
        try:
            hooks.wait_for_servers(state.maybe_shutdown)
        except DatabaseUnavailable as error:
            if hooks.required:
                raise
            hooks.go_uncoordinated(error)
            return
        hooks.entry = entry = Entry(node)
        try:
            entry.register(state.maybe_shutdown)
            if not hooks.required:
                # Were it to fail later, its consumer would have the connection and the queues of a
                # node.
                entry.complete(state.maybe_shutdown)
        except BaseException as error:
            if hooks.required or not isinstance(error, Exception):
                hooks.leave()
                raise
            hooks.go_uncoordinated(error)

    def register_with_event_loop(self, parent: Any, hub: Any) -> None:
        """The event loop is about to begin, for the first connection or another."""
        if 'solo' in type(parent.pool).__module__:
            return  # its tasks run in the loop, and may take long
        if self._cold is None:
            self._cold = ColdShutdown(parent)
        self._cold.follow(hub)

    def close(self, parent: Any) -> None:
        """The worker shuts down: give the tokens away while the running tasks end."""
        self._hooks.closing()

    def stop(self, parent: Any) -> None:
        """Leaving comes later, after the pool: see GateStep.shutdown."""

    terminate = stop


class _HookedStep(bootsteps.StartStopStep):  # type: ignore[misc]
    """A step of a worker that is a node; not of one in a test, whose node stands in."""

    def __init__(self, parent: Any, **options: Any) -> None:
        super().__init__(parent, **options)
        hooks = WorkerHooks.of(parent.app)
        assert hooks is not None
        self._hooks = hooks
        self.enabled = node_of_tests() is None


class GateStep(_HookedStep):
    """Puts the gate into the consumer."""

    requires = ('celery.worker.consumer.connection:Connection',)

    def __init__(self, parent: Any, **options: Any) -> None:
        super().__init__(parent, **options)
        if self.enabled:
            self._hooks.attach(parent)

    def start(self, parent: Any) -> None:
        """A connection is there, the first one or another."""
        self._hooks.connected()

    def stop(self, parent: Any) -> None:
        """The connection is lost, or the worker stops."""
        self._hooks.disconnected()

    def shutdown(self, parent: Any) -> None:
        """The worker ends, and all of its tasks have: leave the cluster."""
        self._hooks.leave()


class ReadyStep(_HookedStep):
    """Has the node take part once the consumer has everything, mingle's second of silence among
    it, and right before it takes messages: what owns keys before it can work on them makes them
    wait.
    """

    requires = (GateStep, *(f'celery.worker.consumer.{step}' for step in _BEFORE))

    def start(self, parent: Any) -> None:
        """Wait for the node's first tokens; at the first connection alone."""
        entry = self._hooks.entry
        if entry is None or self._hooks.job is None:
            return
        events = getattr(parent.event_dispatcher, 'connection', None)
        keep_alive = KeepAlive(parent.connection, events)

        def check() -> None:
            state.maybe_shutdown()
            keep_alive.look()

        try:
            entry.complete(check)
        except Exception as error:
            logger.critical('JobSync: %s', error)
            raise WorkerShutdown(_EX_FAILURE) from error
