"""How housekeeping paces its chores, and when its thread lives."""

from __future__ import annotations

import itertools
import threading

import pytest

from jobsync_core import CoordinationConfig, clock
from jobsync_core.agent import housekeeper
from jobsync_core.agent.housekeeper import Housekeeper, Pace
from jobsync_core.store.connection import Connection
from jobsync_core.store.housekeeping import Chore, HousekeepingStore, Slice
from jobsync_core.store.tables import Tables
from tests.support.waiting import eventually

CHORE = Chore('rows', 30.0, '')


class Store:
    """Stands for the database: hands out what each statement finds, or raises it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.found: dict[str, object] = {}
        self.ran: list[str] = []
        self.opened = 0
        monkeypatch.setattr(Connection, 'open', self.open)
        monkeypatch.setattr(HousekeepingStore, 'run', self.run)

    closed = False

    def open(self, config: CoordinationConfig, name: str) -> Store:
        self.opened += 1
        return self

    def close(self) -> None:
        pass

    def run(self, chore: Chore, rows: int, position: str | None) -> Slice:
        self.ran.append(chore.name)
        found = self.found.get(chore.name, 0)
        if isinstance(found, BaseException):
            raise found
        assert isinstance(found, int)
        return Slice(min(found, rows), None)


class Lead:
    """Whether the node leads."""

    def __init__(self, leads: bool = True) -> None:
        self.leads = leads

    def __call__(self) -> bool:
        return self.leads


def keeper(lead: Lead, *chores: Chore) -> Housekeeper:
    config = CoordinationConfig(host='/nowhere', dbname='none', user='nobody')
    return Housekeeper(config, Tables('sync_'), 'n1', lead, chores or (CHORE,))


def test_a_slice_that_was_full_is_followed_by_another_and_the_last_one_by_a_rest() -> None:
    pace = Pace(CHORE, 0.0, rows=100)
    pace.done(Slice(100, 'here'), 0.2, 1.0)
    assert pace.position == 'here'
    assert 1.0 < pace.due < 1.2
    pace.done(Slice(99, 'there'), 0.2, 2.0)
    assert pace.position is None
    assert pace.due == 32.0


def test_slices_grow_while_they_are_quick_and_shrink_when_they_are_slow() -> None:
    pace = Pace(CHORE, 0.0, rows=1000)
    pace.done(Slice(1000, None), 0.01, 0.0)
    assert pace.rows == 2000
    for _ in range(20):
        pace.done(Slice(pace.rows, None), 0.01, 0.0)
    assert pace.rows == 20_000
    pace.done(Slice(20_000, None), 1.0, 0.0)
    assert pace.rows == 10_000
    for _ in range(20):
        pace.failed(0.0)
    assert pace.rows == 1


def test_a_failure_is_said_once_and_then_once_a_minute_with_its_count() -> None:
    pace = Pace(CHORE, 0.0)
    said = []
    now = 0.0
    while now < 300.0:
        count = pace.failed(now)
        if count is not None:
            said.append((now, count))
        assert now < pace.due <= now + 60.0
        now = pace.due
    assert said[0] == (0.0, 1)
    assert 4 <= len(said) <= 6
    assert all(later - earlier >= 60.0 for (earlier, _), (later, _) in itertools.pairwise(said))
    assert said[1][1] > 1


def test_a_failure_does_not_make_the_next_success_late() -> None:
    pace = Pace(CHORE, 0.0, rows=8)
    for _ in range(10):
        pace.failed(0.0)
    assert pace.due == 60.0
    pace.done(Slice(0, None), 0.0, 60.0)
    pace.failed(90.0)
    assert pace.due == 91.0


def test_a_chore_that_fails_holds_up_no_other(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store(monkeypatch)
    store.found['bad'] = ZeroDivisionError('of the chore')
    lead = Lead()
    duty = keeper(lead, Chore('bad', 0.01, ''), Chore('good', 0.01, ''))
    duty.look()
    eventually(lambda: store.ran.count('good') >= 5)
    assert duty.stop(5.0)
    assert [
        record.getMessage() for record in caplog.records if 'of the chore' in record.getMessage()
    ] == ["node=n1 housekeeping='bad' failed: of the chore; tried again in 1 s"]


def test_a_follower_has_no_thread_and_asks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(monkeypatch)
    lead = Lead(False)
    duty = keeper(lead)
    for _ in range(100):
        duty.look()
    assert not duty.running
    assert store.opened == 0


def test_it_stops_at_once_when_the_node_no_longer_leads_and_begins_again_when_it_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = Store(monkeypatch)
    lead = Lead()
    store.found['rows'] = 10**9
    monkeypatch.setattr(housekeeper, '_REST', 0.0)
    monkeypatch.setattr(housekeeper, '_LOOK_SEC', 0.0)
    duty = keeper(lead)
    duty.look()
    eventually(lambda: len(store.ran) > 10)
    lead.leads = False
    eventually(lambda: not duty.running)
    count = len(store.ran)
    duty.look()
    assert not duty.running
    lead.leads = True
    duty.look()
    eventually(lambda: len(store.ran) > count)
    assert duty.stop(5.0)
    duty.look()
    assert not duty.running


def test_a_process_that_can_start_no_thread_tries_again_later(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store(monkeypatch)
    now = [100.0]
    monkeypatch.setattr(clock, 'now', lambda: now[0])
    duty = keeper(Lead())

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, 'start', refuse)
        for _ in range(10):
            duty.look()
    assert len([record for record in caplog.records if 'cannot start' in record.getMessage()]) == 1
    duty.look()
    assert not duty.running
    now[0] += 60.0
    duty.look()
    eventually(lambda: store.ran)
    assert duty.stop(5.0)
