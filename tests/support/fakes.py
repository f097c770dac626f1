"""Stand-ins for what adapters ask: the clock, the node, the map of owners, the ledger."""

from __future__ import annotations

from typing import Any

from jobsync_core.errors import DuplicateExecution, JobSyncError, ResultLost
from jobsync_core.ledger.single import SingleLedger
from jobsync_core.ledger.state import Unsettled
from jobsync_core.protocol.pausing import Pausing
from jobsync_core.worker.owners import Place

__all__ = ['Clock', 'FakeJob', 'FakeLedger', 'FakeOwners', 'duplicate', 'lost_result']


class Clock:
    """Time that a test moves."""

    def __init__(self) -> None:
        self.time = 1000.0

    def now(self) -> float:
        return self.time


class FakeJob:
    """A node as the gate sees it."""

    node_name = 'n1'
    token_version = 1

    def __init__(self) -> None:
        self.mine: set[str] = set()
        self.leased = True
        self.incarnation = 'life-1'
        self.pausing = Pausing()

    def owns(self, route: str, group: str = '') -> bool:
        return route in self.mine and self.leased

    def am_i_healthy(self) -> bool:
        return self.leased

    def task_to_token(self, route: str) -> int:
        return len(route)

    def token_of(self, route: str, group: str = '') -> int:
        return self.task_to_token(route)


class FakeOwners:
    """An owner map that a test writes."""

    version = 1

    def __init__(self) -> None:
        self.places: dict[str, Place] = {}
        self.error: Exception | None = None

    def refresh(self) -> bool:
        return True

    def catch_up(self, seconds: float = 0.0) -> bool:
        return True

    def find(self, route: str, home: str = '') -> Place:
        if self.error is not None:
            raise self.error
        return self.places.get(route, Place())


class FakeLedger(SingleLedger):
    """Answers with an error that a test chooses."""

    def __init__(self) -> None:
        self.begin_error: JobSyncError | None = None
        self.finish_error: JobSyncError | None = None
        self.keys: list[str] = []

    def begin(self, mine: Unsettled) -> None:
        self.keys.append(mine.key)
        if self.begin_error is not None:
            raise self.begin_error
        super().begin(mine)

    def settle(self, mine: Unsettled) -> None:
        if mine.succeeded and self.finish_error is not None:
            raise self.finish_error
        super().settle(mine)


def duplicate(result: Any = 6) -> DuplicateExecution:
    """What the ledger says of a key that is complete."""
    error = DuplicateExecution()
    vars(error).update(key='d:3', result=result)
    return error


def lost_result() -> ResultLost:
    """What the ledger says of a key that is complete and whose result nobody knows."""
    error = ResultLost()
    error.key = 'd:3'
    return error
