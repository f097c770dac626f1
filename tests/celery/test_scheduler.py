"""One scheduler in this process, under a clock of the test's: entries that are new, changed,
removed, late or wrong.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from celery import Celery
from celery.beat import Scheduler, SchedulingError
from celery.schedules import crontab
from celery.signals import before_task_publish

from jobsync_celery import JobSync
from jobsync_celery.beat import JobSyncScheduler
from jobsync_celery.beat.slots import slot_id
from jobsync_core import clock
from jobsync_core.config import CoordinationConfig
from jobsync_core.store.schedules import ScheduleStore
from tests.support.cluster import query

START = datetime(2024, 5, 6, 7, 0, tzinfo=timezone.utc)


class World:
    """A database, a clock, and what was sent."""

    def __init__(self, config: CoordinationConfig) -> None:
        self.config = config
        self.now = START
        self.sent: list[tuple[str, datetime]] = []
        self.ids: list[str] = []
        self.schedulers: list[JobSyncScheduler] = []
        before_task_publish.connect(self._note)

    def _note(self, sender: str, headers: dict[str, Any], **_: Any) -> None:
        self.sent.append((sender, datetime.fromisoformat(headers['jobsync_slot'])))
        self.ids.append(headers['id'])

    def scheduler(self, schedule: dict[str, Any], **conf: Any) -> JobSyncScheduler:
        """A scheduler, the only one that leads from now on."""
        for other in self.schedulers:
            other.close()
        app = Celery('world', broker='memory://', set_as_current=False)
        names = (
            'host',
            'port',
            'dbname',
            'user',
            'password',
            'appname',
            'heartbeat_interval_sec',
            'heartbeat_timeout_sec',
        )
        app.conf.jobsync = {name: getattr(self.config, name) for name in names}
        app.conf.update(result_expires=None, **conf)
        app.conf.beat_schedule = {
            name: {
                'task': name,
                'schedule': entry,
                **({} if not isinstance(entry, dict) else entry),
            }
            for name, entry in schedule.items()
        }
        app.now = lambda: self.now
        self.schedulers.append(JobSyncScheduler(app))
        return self.schedulers[-1]

    def run(self, scheduler: JobSyncScheduler, seconds: float = 0.0) -> list[tuple[str, float]]:
        """Let time pass, tick until nothing is due; what was sent, with the seconds from START to
        its slot.
        """
        self.now += timedelta(seconds=seconds)
        before = len(self.sent)
        while scheduler.tick() == 0:
            pass
        return [(name, (slot - START).total_seconds()) for name, slot in self.sent[before:]]

    def rows(self) -> list[tuple[Any, ...]]:
        return query(
            self.config, 'SELECT name, slot, total_run_count, entry FROM {}schedule ORDER BY name'
        )


@pytest.fixture
def world(config: CoordinationConfig) -> Iterator[World]:
    found = World(config)
    yield found
    before_task_publish.disconnect(found._note)
    for scheduler in found.schedulers:
        scheduler.close()


def test_a_new_entry_counts_from_now_and_its_slots_do_not_drift(world: World) -> None:
    scheduler = world.scheduler({'a': 10})
    assert world.run(scheduler) == []
    assert world.run(scheduler, 13) == [('a', 10)]
    assert world.run(scheduler, 8) == [('a', 20)]
    assert world.rows() == [('a', START + timedelta(seconds=20), 2, 'a <freq: 10.00 seconds>')]
    assert world.ids == [slot_id(world.config.appname, 'a', slot) for _, slot in world.sent]


def test_a_successor_goes_on_where_the_last_one_was(world: World) -> None:
    world.run(world.scheduler({'a': 10}))
    scheduler = world.scheduler({'a': 10})
    assert world.run(scheduler, 12) == [('a', 10)]
    assert world.run(world.scheduler({'a': 10}), 7) == []
    successor = world.scheduler({'a': 10})
    assert world.run(successor, 1) == [('a', 20)]
    assert (successor.schedule['a'].last_run_at, successor.schedule['a'].total_run_count) == (
        START + timedelta(seconds=20),
        2,
    )


def test_after_an_outage_the_newest_slot_is_sent_and_no_other(world: World) -> None:
    scheduler = world.scheduler({'a': 10, 'b': crontab('*/5'), 'c': 7200})
    assert world.run(scheduler) == []
    assert world.run(scheduler, 3601) == [('a', 3600), ('b', 3600)] or world.run(scheduler) == []
    assert sorted(world.run(scheduler, 299 + 300)) == [('a', 4200), ('b', 4200)]


def test_a_crontab_that_is_too_late_is_passed_over(world: World) -> None:
    scheduler = world.scheduler({'a': crontab('0', '8')}, beat_cron_starting_deadline=60)
    world.run(scheduler)
    assert world.run(scheduler, 3600 + 61) == []
    assert world.rows()[0][1:3] == (START + timedelta(hours=1), 0)
    assert world.run(scheduler, 86_400 - 1) == [('a', 3600 + 86_400)]


def test_what_wraps_celery_s_apply_entry_sees_each_slot(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    apply_entry, seen = Scheduler.apply_entry, []

    def wrapped(*args: Any, **kwargs: Any) -> None:  # as Sentry's does for its monitors
        _, entry = args
        entry.options['headers']['monitor'] = entry.name
        seen.append((entry.name, entry.options['headers']['jobsync_slot']))
        apply_entry(*args, **kwargs)

    monkeypatch.setattr(Scheduler, 'apply_entry', wrapped)
    scheduler = world.scheduler({'a': 10})
    world.run(scheduler)
    assert world.run(scheduler, 21) == [('a', 20)]
    assert world.run(scheduler, 10) == [('a', 30)]
    assert seen == [('a', slot.isoformat()) for _, slot in world.sent]
    assert 'monitor' not in (scheduler.schedule['a'].options.get('headers') or {})


def test_whoever_sends_an_entry_by_hand_hears_of_an_error(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise SchedulingError('refused')

    scheduler = world.scheduler({'a': 10})
    monkeypatch.setattr(Scheduler, 'apply_async', refuse)
    with pytest.raises(SchedulingError, match='refused'):
        scheduler.apply_async(scheduler.schedule['a'])


def test_celery_s_own_entry_is_there(world: World) -> None:
    app = Celery('default', broker='memory://', set_as_current=False)
    app.conf.jobsync = {
        name: getattr(world.config, name) for name in ('host', 'port', 'dbname', 'password')
    }
    scheduler = JobSyncScheduler(app)
    assert set(scheduler.schedule) == {'celery.backend_cleanup'}
    scheduler.close()


def test_crontabs_are_in_the_zone_of_the_app(world: World) -> None:
    scheduler = world.scheduler({'a': crontab('30', '9')}, timezone='Europe/Berlin')
    assert world.run(scheduler) == []
    assert world.run(scheduler, 1800) == [('a', 1800)]


def test_a_changed_entry_counts_from_its_last_slot(world: World) -> None:
    scheduler = world.scheduler({'a': 100})
    world.run(scheduler)
    assert world.run(scheduler, 100) == [('a', 100)]
    changed = world.scheduler({'a': 30})
    assert world.run(changed, 29) == []
    assert world.run(changed, 1) == [('a', 130)]
    assert world.rows()[0][3] == 'a <freq: 30.00 seconds>'


def test_an_entry_may_change_and_come_while_the_scheduler_runs(world: World) -> None:
    scheduler = world.scheduler({'a': 100})
    world.run(scheduler)
    scheduler.add(name='b', task='b', schedule=5)
    scheduler.add(name='a', task='a', schedule=7)
    world.run(scheduler)
    assert world.run(scheduler, 6) == [('b', 5)]
    assert world.run(scheduler, 1) == [('a', 7)]
    del scheduler.schedule['b']
    assert world.run(scheduler, 6) == []


def test_a_removed_entry_is_not_sent_and_forgotten_after_a_day(world: World) -> None:
    world.run(world.scheduler({'a': 10, 'b': 10}))
    assert world.run(world.scheduler({'b': 10}), 10) == [('b', 10)]
    assert [row[0] for row in world.rows()] == ['a', 'b']
    query(world.config, "UPDATE {}schedule SET updated_at = now() - interval '25 hours'")
    world.run(world.scheduler({'b': 10}))
    assert [row[0] for row in world.rows()] == ['b']


def test_an_entry_whose_row_is_deleted_begins_anew(world: World) -> None:
    scheduler = world.scheduler({'a': 10})
    world.run(scheduler)
    query(world.config, 'DELETE FROM {}schedule')
    world.now += timedelta(seconds=15)
    assert scheduler.tick() > 0
    assert world.run(scheduler) == []
    assert world.run(scheduler, 10) == [('a', 25)]


def test_a_slot_that_another_has_sent_is_adopted(world: World) -> None:
    scheduler = world.scheduler({'a': 10})
    world.run(scheduler)
    query(
        world.config,
        'UPDATE {}schedule SET slot = slot + %s, total_run_count = 7',
        (timedelta(seconds=10),),
    )
    assert world.run(scheduler, 12) == []
    assert world.run(scheduler, 8) == [('a', 20)]
    assert world.rows()[0][2] == 8


def test_a_clock_that_is_behind_sends_nothing_again(world: World) -> None:
    scheduler = world.scheduler({'a': 10})
    world.run(scheduler)
    assert world.run(scheduler, 30) == [('a', 30)]
    assert world.run(world.scheduler({'a': 10}), -25) == []
    assert world.run(world.scheduler({'a': 10}), 34) == []
    assert world.run(world.scheduler({'a': 10}), 1) == [('a', 40)]


def test_a_slot_in_the_far_future_is_pointed_out(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.run(world.scheduler({'a': 10}))
    world.run(world.scheduler({'a': 10}), -600)
    assert 'is a clock wrong?' in caplog.text


def test_an_entry_that_cannot_be_reckoned_does_not_stop_the_others(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    scheduler = world.scheduler({'a': 0, 'b': 10})
    world.run(scheduler)
    assert world.run(scheduler, 10) == [('b', 10)]
    assert world.run(scheduler, 10) == [('b', 20)]
    assert (
        caplog.text.count(
            "entry 'a': <freq: now>: the interval of a periodic task must be more than zero"
        )
        == 1
    )


def test_an_entry_that_cannot_be_sent_is_reported_and_over(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    scheduler = world.scheduler({'a': {'schedule': 10, 'args': (object(),)}, 'b': 10})
    world.run(scheduler)
    world.run(scheduler, 10)
    assert ('b', START + timedelta(seconds=10)) in world.sent
    assert caplog.text.count('Message Error') == 1
    assert [row[1] for row in world.rows()] == [START + timedelta(seconds=10)] * 2


def test_a_message_keeps_the_options_of_its_entry_but_for_the_id(world: World) -> None:
    seen: dict[str, Any] = {}

    def note(routing_key: str, headers: dict[str, Any], **_: Any) -> None:
        seen.update(headers, routing_key=routing_key)

    before_task_publish.connect(note)
    options = {'queue': 'slow', 'headers': {'mine': 1}, 'task_id': 'fixed'}
    scheduler = world.scheduler({'a': {'schedule': 10, 'options': options}})
    world.run(scheduler)
    world.run(scheduler, 10)
    assert (seen['routing_key'], seen['mine']) == ('slow', 1)
    assert seen['id'] == slot_id(world.config.appname, 'a', START + timedelta(seconds=10))
    assert options['headers'] == {'mine': 1}


def test_a_slot_that_was_sent_but_perhaps_not_recorded_is_not_sent_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = world.scheduler({'a': 10})
    world.run(scheduler)
    advance = ScheduleStore.advance

    def cut(store: ScheduleStore, *args: Any) -> None:
        monkeypatch.setattr(ScheduleStore, 'advance', advance)
        query(world.config, 'SELECT pg_terminate_backend(%s)', (store.connection.info.backend_pid,))
        advance(store, *args)

    monkeypatch.setattr(ScheduleStore, 'advance', cut)
    world.now += timedelta(seconds=10)
    assert scheduler.tick() > 0  # the database is away
    assert world.run(scheduler) == []
    assert [slot for _, slot in world.sent] == [START + timedelta(seconds=10)]
    assert world.rows()[0][1:3] == (START + timedelta(seconds=10), 1)


def test_a_sender_that_was_held_up_sends_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    scheduler = world.scheduler({'a': 10})
    world.run(scheduler)

    def hold(**_: Any) -> None:
        monkeypatch.setattr(clock, 'now', lambda: float('inf'))

    before_task_publish.connect(hold)
    world.now += timedelta(seconds=10)
    scheduler.tick()
    monkeypatch.undo()
    before_task_publish.disconnect(hold)
    assert 'took too long' in caplog.text
    assert world.rows()[0][1:3] == (START, 0)
    assert world.run(scheduler) == [('a', 10)]


def test_the_lazy_scheduler_of_the_banner_needs_no_database() -> None:
    app = Celery('lazy', broker='memory://', set_as_current=False)
    app.conf.jobsync_database_url = 'postgresql://someone:secret@nowhere.invalid:1/db'
    info = JobSyncScheduler(app, lazy=True).info
    assert 'nowhere.invalid:1/db' in info
    assert 'secret' not in info


def test_it_takes_the_settings_of_the_plugin_where_that_is_installed(world: World) -> None:
    app = Celery('plugin', broker='memory://', set_as_current=False)
    JobSync(app, config=world.config)
    app.conf.beat_schedule = {'a': {'task': 'a', 'schedule': 10}}
    app.conf.result_expires = None
    app.now = lambda: world.now
    scheduler = JobSyncScheduler(app)
    try:
        world.run(scheduler)
        assert world.run(scheduler, 10) == [('a', 10)]
    finally:
        scheduler.close()


def test_one_line_tells_why_it_does_not_start(config: CoordinationConfig) -> None:
    app = Celery('refused', broker='memory://', set_as_current=False)
    app.conf.jobsync_database_url = 'postgresql://someone@127.0.0.1:1/db'
    with pytest.raises(SystemExit, match='celery beat -S jobsync: cannot connect to PostgreSQL at'):
        JobSyncScheduler(app)


@pytest.fixture(autouse=True)
def _log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
