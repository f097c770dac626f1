"""Bootsteps: a worker is a node from before its consumer starts until after its last task has
ended.
"""

from __future__ import annotations

import threading
from typing import Any

from celery import bootsteps
from celery.exceptions import WorkerShutdown
from celery.worker import state

from jobsync_core.errors import DatabaseUnavailable, JobSyncError
from jobsync_core.worker.node_of_tests import node_of_tests

from .cold_shutdown import ColdShutdown
from .hooks import WorkerHooks
from .logs import get_logger

__all__ = ['GateStep', 'NodeStep']

logger = get_logger(__name__)

_EX_FAILURE = 1


class NodeStep(bootsteps.StartStopStep):  # type: ignore[misc]  # celery has no types
    """Makes the Job before the pool forks, enters it after."""

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
        """Enter the Job, before any message is consumed."""
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
        node = self._hooks.node
        node.serve()
        try:
            self._hooks.wait_for_servers(state.maybe_shutdown)
        except DatabaseUnavailable as error:
            if self._hooks.required:
                raise
            self._hooks.go_uncoordinated(error)
            return
        failure: list[Exception] = []

        def enter() -> None:
            try:
                node.enter()
            except Exception as error:
                failure.append(error)

        thread = threading.Thread(target=enter, name='jobsync-enter', daemon=True)
        thread.start()
        try:
            while thread.is_alive():
                thread.join(0.1)
                state.maybe_shutdown()
        except BaseException:
            node.give_up()
            thread.join(10)
            node.leave()
            raise
        if not failure:
            try:
                node.start()
            except BaseException:
                self._hooks.leave()
                raise
        elif self._hooks.required:
            raise failure[0]
        else:
            self._hooks.go_uncoordinated(failure[0])

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


class GateStep(bootsteps.StartStopStep):  # type: ignore[misc]
    """Puts the gate into the consumer."""

    requires = ('celery.worker.consumer.connection:Connection',)

    def __init__(self, parent: Any, **options: Any) -> None:
        super().__init__(parent, **options)
        hooks = WorkerHooks.of(parent.app)
        assert hooks is not None
        self._hooks = hooks
        self.enabled = node_of_tests() is None
        if self.enabled:
            hooks.attach(parent)

    def start(self, parent: Any) -> None:
        """A connection is there, the first one or another."""
        self._hooks.connected()

    def stop(self, parent: Any) -> None:
        """The connection is lost, or the worker stops."""
        self._hooks.disconnected()

    def shutdown(self, parent: Any) -> None:
        """The worker ends, and all of its tasks have: leave the cluster."""
        self._hooks.leave()
