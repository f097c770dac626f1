"""Many `celery beat` processes: each slot is sent once, under one id, whoever dies, stops, or
cannot be reached.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from jobsync_celery.beat.slots import slot_id
from jobsync_core.config import CoordinationConfig
from tests.support.brokers import BrokerServer
from tests.support.cluster import query
from tests.support.proxy import Mode, Proxy
from tests.support.waiting import eventually

from .beats import Beat, Stage, gaps, repeated

#: Twice this is longer than a take-over takes here, so that no slot may be missing.
SECONDS = 3.0
MakeStage = Callable[..., Stage]


@pytest.fixture
def make_stage(
    request: pytest.FixtureRequest, config: CoordinationConfig, tmp_path: Path
) -> Iterator[MakeStage]:
    stages = []

    def make(schedule: dict[str, float] | None = None, broker: str = 'redis_server') -> Stage:
        server: BrokerServer = request.getfixturevalue(broker)
        space = server.new_space()
        stages.append(
            (
                Stage(config, server.url(space), tmp_path, schedule or {'tick': SECONDS}),
                server,
                space,
            )
        )
        return stages[-1][0]

    yield make
    for stage, server, space in stages:
        stage.close()
        server.drop_space(space)


@pytest.fixture
def stage(make_stage: MakeStage) -> Stage:
    return make_stage()


def leader_and_follower(stage: Stage) -> tuple[Beat, Beat]:
    """Two beats, of which the first leads."""
    leader = stage.beat()
    stage.wait_from(leader)
    follower = stage.beat()
    follower.wait_idle()
    return leader, follower


def check(stage: Stage) -> None:
    """Each slot was sent, once, under its own id."""
    for name, seconds in stage.schedule.items():
        messages = stage.messages(name)
        assert gaps(messages, seconds) == [], messages
        assert [message.id for message in messages] == [
            slot_id(stage.config.appname, name, message.slot) for message in messages
        ]


@pytest.mark.parametrize('broker', ['redis_server', 'rabbitmq_server'])
def test_killed_leaders_are_replaced_and_each_slot_is_sent_once(
    make_stage: MakeStage, broker: str
) -> None:
    stage = make_stage({'tick': SECONDS, 'tock': SECONDS + 1}, broker)
    leader, follower = leader_and_follower(stage)
    for _ in range(2):
        stage.wait_calm()
        leader.kill(signal.SIGKILL)
        leader.wait()
        leader, follower = follower, stage.beat()
        stage.wait_from(leader, 2)
        follower.wait_idle()
    assert len({message.sender for message in stage.messages()}) == 3
    check(stage)


def test_a_follower_takes_over_within_seconds_of_a_kill(stage: Stage) -> None:
    leader, follower = leader_and_follower(stage)
    stage.wait_calm()
    leader.kill(signal.SIGKILL)
    eventually(lambda: 'this scheduler is the active one' in follower.log, timeout=8)
    stage.wait_from(follower, 2)
    check(stage)


def test_a_stopped_leader_is_replaced_and_sends_nothing_twice_when_it_goes_on(stage: Stage) -> None:
    leader, follower = leader_and_follower(stage)
    stage.wait_calm()
    leader.kill(signal.SIGSTOP)
    before = len(stage.messages())
    stage.wait_from(follower, 2)
    leader.kill(signal.SIGCONT)
    eventually(lambda: 'another scheduler is the active one' in leader.log)
    stage.wait_messages(before + 4)
    assert {message.sender for message in stage.messages()[before:]} == {follower.pid}
    check(stage)


def test_a_leader_that_stops_while_it_holds_a_slot_does_not_send_it_when_it_goes_on(
    stage: Stage,
) -> None:
    leader = stage.beat('before:SIGSTOP:2')
    stage.wait_from(leader)
    follower = (
        stage.beat()
    )  # the database ends the sessions of the stopped one, and with them its hold
    messages = stage.wait_from(follower, 2)
    leader.kill(signal.SIGCONT)
    eventually(lambda: 'took too long to send' in leader.log)
    stage.wait_from(follower, len(messages) + 2)
    assert len([message for message in stage.messages() if message.sender == leader.pid]) == 1
    assert repeated(stage.messages()) == {}


def test_a_slot_whose_sender_dies_before_it_is_recorded_is_sent_again_under_the_same_id(
    stage: Stage,
) -> None:
    leader = stage.beat('after:SIGKILL:4')
    stage.wait_from(leader)
    follower = stage.beat()
    follower.wait_idle()
    last = stage.wait_from(leader, 4)[-1]
    leader.wait()
    again = stage.wait_from(follower, 2)
    assert again[0].id == last.id and again[0].slot == last.slot
    assert repeated(stage.messages()) == {last.id: 2}
    assert gaps(stage.messages(), SECONDS) == [0]


def test_a_beat_that_is_told_to_end_records_what_it_has_just_sent(stage: Stage) -> None:
    beat = stage.beat('after:SIGTERM:2')
    messages = stage.wait_from(beat, 2)
    assert beat.wait() == 0
    assert stage.recorded('tick') == messages[1].slot


def test_where_all_beats_tick_the_rows_alone_keep_slots_from_being_sent_twice(
    make_stage: MakeStage,
) -> None:
    # As behind a transaction pooler. Three fast entries: the beats meet at the rows all the time.
    stage = make_stage({'a': 0.5, 'b': 0.5, 'c': 0.7})
    beats = [stage.beat(listen='false') for _ in range(3)]
    for beat in beats:
        stage.wait_from(beat, 3)
    stage.wait_messages(len(stage.messages()) + 30)
    for name, seconds in stage.schedule.items():
        messages = stage.messages(name)
        assert repeated(messages) == {}
        assert all(step == int(step) for step in gaps(messages, seconds))


def test_a_database_outage_is_told_once_and_slots_go_on_after_it(stage: Stage) -> None:
    with Proxy(stage.config.host, int(stage.config.port)) as proxy:
        beat = stage.beat(host=proxy.host, port=proxy.port)
        stage.wait_from(beat)
        stage.wait_calm()
        proxy.switch(Mode.REFUSE)
        proxy.reset()
        eventually(lambda: 'nothing is sent until the database is back' in beat.log)
        before = stage.messages()
        due = before[-1].slot + timedelta(seconds=2 * SECONDS)
        eventually(lambda: query(stage.config, 'SELECT now() > %s', (due,))[0][0], timeout=30)
        assert stage.messages() == before
        proxy.heal()
        after = stage.wait_messages(len(before) + 2)
        assert (
            beat.log.count('nothing is sent until the database is back')
            == beat.log.count('database: all is well again')
            == 1
        )
        # What was missed is caught up with one task, for the newest slot.
        assert after[len(before)].slot >= due
        assert repeated(after) == {}
        assert all(step == int(step) for step in gaps(after, SECONDS))


@pytest.mark.parametrize('broker', ['own_redis', 'own_rabbitmq'])
def test_a_broker_outage_is_told_once_and_slots_go_on_after_it(
    make_stage: MakeStage, request: pytest.FixtureRequest, broker: str
) -> None:
    stage, server = make_stage(broker=broker), request.getfixturevalue(broker)
    beat = stage.beat()
    stage.wait_from(beat)
    stage.wait_calm()
    recorded = stage.recorded('tick')
    server.stop()
    eventually(lambda: 'beat: broker' in beat.log, timeout=20)
    assert stage.recorded('tick') == recorded
    server.start()
    stage.wait_from(beat, 3)
    assert beat.log.count('(it is tried again)') == beat.log.count('broker: all is well again') == 1
    assert repeated(stage.messages()) == {}


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({'port': 1}, 'celery beat -S jobsync: cannot connect to PostgreSQL at'),
        (
            {'heartbeat_timeout_sec': 'soon'},
            'celery beat -S jobsync: JOBSYNC_HEARTBEAT_TIMEOUT_SEC=',
        ),
        (
            {'appname': 'no-prefix'},
            "celery beat -S jobsync: appname='no-prefix' is no table prefix",
        ),
    ],
)
def test_a_beat_that_cannot_start_says_why_in_one_line(
    stage: Stage, settings: dict[str, Any], message: str
) -> None:
    beat = stage.beat(**settings)
    assert beat.wait(60) == 1
    assert message in beat.log
    assert 'Traceback' not in beat.log
