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

    def catch_up(self, seconds: float = 0.0) -> bool:
        self._job.leased = False
        return True


@pytest.mark.parametrize('place', [Place('n2', 'q.n2'), Place()], ids=['owned', 'of nobody'])
def test_a_lease_that_ends_while_the_owner_is_looked_up_sends_nothing_on(place: Place) -> None:
    job = FakeJob()
    owners = SlowOwners(job)
    owners.places['k'] = place
    core: Any = Gate(PluginSettings(config=CoordinationConfig(appname='shop_')), job)  # type: ignore[arg-type]  # all that it needs
    core.owners = owners
    # Its time in memory is over: with a lease it would be parked, or passed on.
    assert core.place(Received(job.incarnation, 'k', until=1.0), 2.0).action is Action.WAIT
    job.leased, owners.version = True, job.token_version
    assert core.place(Received(job.incarnation, 'k', until=1.0), 2.0).action is Action.SEND


@pytest.fixture
def gate() -> Any:
    """The gate of `n1`, where the task `render` is pinned to `gpu-%`."""
    made: Any = Gate(
        PluginSettings(config=CoordinationConfig(appname='shop_'), queue_groups={'g': ['home']}),
        FakeJob(),  # type: ignore[arg-type]  # all that it needs
        {'render': ['gpu-%']}.get,
    )
    made.owners = FakeOwners()
    return made


def test_what_is_pinned_to_others_is_parked_though_the_row_says_that_it_is_here(
    gate: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Its token has other keys as well, which go on; and it waits in nobody's memory."""
    gate.job.mine = {f'render#{slot}' for slot in range(20)} | {'order-1'}
    for route in sorted(gate.job.mine - {'order-1'}):
        gate.owners.places[route] = Place(unmatched=True)
        delivery = Received(gate.job.incarnation, route, until=99.0, home='home')
        outcome = gate.place(delivery, 1.0)
        assert (outcome.action, outcome.queue) == (Action.SEND, 'home.jobsync.shop_.parked')
        assert not gate.may_begin(delivery)
    assert gate.place(Received(gate.job.incarnation, 'order-1', home='home'), 1.0).action is (
        Action.RUN
    )
    assert caplog.text.count("no live node that consumes this queue matches its pin 'gpu-%'") == 1


def test_what_nobody_consumes_goes_home_unless_this_node_is_about_to(gate: Any) -> None:
    gate.owners.places['order-1'] = Place(deserted=True)
    delivery = Received(gate.job.incarnation, 'order-1', until=99.0, home='home')
    outcome = gate.place(delivery, 1.0)
    assert (outcome.action, outcome.queue) == (Action.SEND, 'home')
    gate.consumes = {'home'}.__contains__
    assert gate.place(delivery, 1.0).action is Action.WAIT


def test_ownership_is_asked_for_in_the_group_of_the_queue(gate: Any) -> None:
    asked: list[str] = []
    gate.job.owns = lambda route, group: asked.append(group)
    gate.may_begin(Received(gate.job.incarnation, 'order-1', home='home'))
    gate.may_begin(Received(gate.job.incarnation, 'order-1', home='mail'))
    assert asked == ['g', 'mail']
