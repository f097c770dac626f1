"""Slots follow from the schedule and the slot before, whenever and wherever they are reckoned."""

from __future__ import annotations

import time
from datetime import datetime, timedelta, timezone, tzinfo
from itertools import islice, pairwise
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from celery import Celery
from celery.schedules import BaseSchedule, crontab, schedule, solar
from hypothesis import given
from hypothesis import strategies as st

from jobsync_celery.beat.slots import newest_slot, slot_id, slots_after

BERLIN = ZoneInfo('Europe/Berlin')
START = datetime(2024, 5, 6, 7, 8, 9, 123456, tzinfo=timezone.utc)


def app_in(zone: str) -> Any:
    app = Celery('slots', set_as_current=False)
    app.conf.timezone = zone
    return app


APP = app_in('Europe/Berlin')


def every(seconds: float, relative: bool = False) -> Any:
    return schedule(timedelta(seconds=seconds), relative=relative, app=APP)


def cron(text: str, app: Any = APP) -> Any:
    minute, hour, day, month, weekday = text.split()
    return crontab(
        minute, hour, day_of_month=day, month_of_year=month, day_of_week=weekday, app=app
    )


def local(rule: Any, after: datetime, count: int, zone: tzinfo = BERLIN) -> list[str]:
    return [
        format(slot.astimezone(zone), '%a %d.%m. %H:%M')
        for slot in islice(slots_after(rule, after), count)
    ]


def one_by_one(rule: Any, after: datetime, now: datetime) -> datetime | None:
    newest = None
    for slot in slots_after(rule, after):
        if slot > now:
            break
        newest = slot
    return newest


def test_intervals_do_not_drift() -> None:
    assert list(islice(slots_after(every(0.1), START), 3)) == [
        START + timedelta(seconds=0.1) * number for number in (1, 2, 3)
    ]


def test_intervals_are_real_time_when_the_clocks_change() -> None:
    start = datetime(2024, 3, 31, 1, 30, tzinfo=BERLIN)
    assert next(slots_after(every(7200), start)) - start.astimezone(timezone.utc) == timedelta(
        hours=2
    )


def test_relative_intervals_are_round() -> None:
    first, second = islice(slots_after(every(3600, relative=True), START), 2)
    assert (first, second) == (
        datetime(2024, 5, 6, 8, tzinfo=timezone.utc),
        datetime(2024, 5, 6, 9, tzinfo=timezone.utc),
    )


def test_crontabs_are_in_the_zone_of_the_app() -> None:
    start = datetime(2024, 5, 6, 12, tzinfo=timezone.utc)
    assert local(cron('0 4 * * *'), start, 2) == ['Tue 07.05. 04:00', 'Wed 08.05. 04:00']
    assert local(cron('0 4 * * *', app_in('UTC')), start, 1) == ['Tue 07.05. 06:00']
    assert local(cron('*/20 9-10 * * 1'), start, 4) == [
        'Mon 13.05. 09:00',
        'Mon 13.05. 09:20',
        'Mon 13.05. 09:40',
        'Mon 13.05. 10:00',
    ]


def test_a_crontab_runs_once_a_day_when_the_clocks_change() -> None:
    for start in (
        datetime(2024, 3, 29, 12, tzinfo=BERLIN),
        datetime(2024, 10, 25, 12, tzinfo=BERLIN),
    ):
        slots = [
            slot.astimezone(BERLIN) for slot in islice(slots_after(cron('30 4 * * *'), start), 4)
        ]
        assert [slot.date() - start.date() for slot in slots] == [
            timedelta(days=number) for number in (1, 2, 3, 4)
        ]
        assert {(slot.hour, slot.minute) for slot in slots} == {(4, 30)}


@pytest.mark.parametrize(
    'rule',
    [
        every(7),
        every(0.25),
        every(90, relative=True),
        every(86_400, relative=True),
        cron('* * * * *'),
        cron('17 */3 * * *'),
        cron('0 0 29 2 *'),
        cron('30 2 * * *'),
    ],
    ids=repr,
)
def test_the_newest_slot_is_the_last_one_that_is_due(rule: Any) -> None:
    first, second = islice(slots_after(rule, START), 2)
    longest = min(1000 * (second - first), timedelta(days=500))
    for part in range(12):
        now = START + longest * part / 11
        assert newest_slot(rule, START, now) == one_by_one(rule, START, now)


@given(st.floats(0.01, 1e6), st.floats(0, 1e6))
def test_slots_do_not_depend_on_when_they_are_looked_at(seconds: float, late: float) -> None:
    rule = every(seconds)
    step: timedelta = rule.run_every
    slot = newest_slot(rule, START, START + timedelta(seconds=late))
    if slot is None:
        assert timedelta(seconds=late) < step
    else:
        assert (slot - START) % step == timedelta(0)
        assert slot <= START + timedelta(seconds=late) < slot + step


@pytest.mark.parametrize(
    'rule', [every(1), every(60, relative=True), cron('* * * * *'), cron('0 0 1 1 *')], ids=repr
)
def test_ten_years_of_outage_are_looked_through_at_once(rule: Any) -> None:
    began = time.perf_counter()
    newest = newest_slot(rule, START, START + timedelta(days=3653))
    assert newest is not None and newest > START + timedelta(days=3650 - 366)
    assert time.perf_counter() - began < 1


def test_an_interval_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match='must be more than zero'):
        next(slots_after(every(0), START))


def test_a_schedule_that_happens_once_ends() -> None:
    class Once(BaseSchedule):  # type: ignore[misc]  # Celery has no types
        def remaining_estimate(self, last_run_at: datetime) -> timedelta:
            remaining: timedelta = START - self.now()
            return remaining

    rule = Once(app=APP)
    assert list(slots_after(rule, START - timedelta(days=1))) == [START]
    assert newest_slot(rule, START, START + timedelta(days=1)) is None


def test_reckoning_leaves_the_schedule_as_it_was() -> None:
    rule = cron('* * * * *')
    before = dict(vars(rule))
    next(slots_after(rule, START))
    assert {name: value for name, value in vars(rule).items() if name != 'tz'} == {
        name: value for name, value in before.items() if name != 'tz'
    }
    assert abs(rule.now() - datetime.now(timezone.utc)) < timedelta(minutes=1)


def test_solar_events_happen_about_daily() -> None:
    pytest.importorskip('ephem')
    for event in ('sunrise', 'solar_noon', 'sunset', 'dusk_civil'):
        slots = list(islice(slots_after(solar(event, 52.5, 13.4, app=APP), START), 400))
        apart = [after - before for before, after in pairwise(slots)]
        assert min(apart) > timedelta(hours=23, minutes=50) and max(apart) < timedelta(
            hours=24, minutes=10
        )
        assert (
            newest_slot(solar(event, 52.5, 13.4, app=APP), START, slots[300] + timedelta(hours=1))
            == slots[300]
        )


def test_an_id_follows_from_cluster_name_and_slot() -> None:
    berlin = START.astimezone(BERLIN)
    assert (
        slot_id('sync_', 'tick', START)
        == slot_id('sync_', 'tick', berlin)
        == '6777b324-1e47-5761-a38c-aee3c20d6f13'
    )
    others = {
        slot_id('other_', 'tick', START),
        slot_id('sync_', 'tock', START),
        slot_id('sync_', 'tick', START + timedelta(microseconds=1)),
    }
    assert len(others | {slot_id('sync_', 'tick', START)}) == 4
