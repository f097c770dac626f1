"""Workers of a StubBroker: a test's, in one process and without a database. They coordinate
nothing, and each key completes once.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from jobsync_core.errors import NotEntered
from jobsync_core.job import Job
from jobsync_core.ledger.current import current_ledger, set_current_ledger
from jobsync_core.ledger.interface import Ledger
from jobsync_core.ledger.single import SingleLedger
from jobsync_core.worker.node_status import node_status

__all__ = ['InMemory', 'is_in_memory', 'ledger_in_memory']

_ledgers: WeakKeyDictionary[Any, SingleLedger] = WeakKeyDictionary()


def is_in_memory(broker: Any) -> bool:
    """Whether the broker keeps its messages in this process alone."""
    # By name, as with the others.
    return any(
        f'{kind.__module__}.{kind.__name__}' == 'dramatiq.brokers.stub.StubBroker'
        for kind in type(broker).__mro__
    )


def ledger_in_memory(broker: Any) -> Ledger | None:
    """The ledger for a message of this broker: that of a Job which the test has entered, else the
    worker's. None with another broker.
    """
    found = _ledgers.get(broker)
    return (_entered_ledger() or found) if found is not None else None


def _entered_ledger() -> Ledger | None:
    try:
        return current_ledger()
    except NotEntered:
        return None


class InMemory:
    """What stands for a node in such a worker, from its start to its end. Functions outside of
    messages do not see it.

    Args:
        broker: The StubBroker.
    """

    #: Nobody asks such a worker whether it takes messages.
    consuming = None

    def __init__(self, broker: Any) -> None:
        # For tests alone, as it is.
        from jobsync_core.testing.memory import MemoryLedger

        self._broker = broker
        _ledgers[broker] = MemoryLedger()
        self.job = Job('stub')
        before = _entered_ledger()
        self.job.__enter__()
        set_current_ledger(before)

    def status(self, job: Job) -> dict[str, Any]:
        """The node as it sees itself, as plain values.

        Args:
            job: The node.
        """
        return node_status(job, consuming=False, messages={})

    def drain(self) -> None:
        """Nothing: there is nobody to give keys to."""

    def leave(self) -> None:
        """The worker has ended; what completed is forgotten."""
        before = _entered_ledger()
        self.job.__exit__(None, None, None)
        set_current_ledger(before)
        _ledgers.pop(self._broker, None)
