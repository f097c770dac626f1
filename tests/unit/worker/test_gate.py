"""What both gates look up of a delivery, and when."""

from __future__ import annotations

from typing import Any

import pytest

from jobsync_core.config import CoordinationConfig
from jobsync_core.worker.gate import Gate
from jobsync_core.worker.inbox import Action, Received
from jobsync_core.worker.owners import Place
from jobsync_core.worker.settings import PluginSettings
from tests.support.fakes import FakeJob, FakeOwners


class SlowOwners(FakeOwners):
    """The map is older than the node, and reading it again outlasts the node's lease."""

    version = 0

    def __init__(self, job: FakeJob) -> None:
        super().__init__()
        self._job = job

    def refresh(self) -> bool:
        self._job.leased = False
        return True


@pytest.mark.parametrize('place', [Place('n2', 'q.n2'), None], ids=['owned', 'of nobody'])
def test_a_lease_that_ends_while_the_owner_is_looked_up_sends_nothing_on(
    place: Place | None,
) -> None:
    job = FakeJob()
    owners = SlowOwners(job)
    if place is not None:
        owners.places['k'] = place
    core: Any = Gate(PluginSettings(config=CoordinationConfig(appname='shop_')), job)  # type: ignore[arg-type]  # all that it needs
    core.owners = owners
    # Its time in memory is over: with a lease it would be parked, or passed on.
    assert core.place(Received(job.incarnation, 'k', until=1.0), 2.0).action is Action.WAIT
    job.leased, owners.version = True, job.token_version
    assert core.place(Received(job.incarnation, 'k', until=1.0), 2.0).action is Action.SEND
