"""A member of a chord whose first attempt was killed after its result was stored: counted once, on
a real Redis.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery, Task, signals, states
from celery.app.task import Context
from celery.exceptions import Ignore

from jobsync_celery import JobSync
from jobsync_celery.tasks import once as once_module
from jobsync_celery.tasks.chords import _uncount_member, count_member
from jobsync_core.config import CoordinationConfig
from jobsync_core.ledger.current import set_current_ledger
from tests.support.brokers import RedisServer
from tests.support.fakes import FakeLedger, duplicate

from .test_once import in_worker, task_of

_SIZE = 3
#: Celery calls what redis-py has new names for.
pytestmark = pytest.mark.filterwarnings('ignore:Call to deprecated .*:DeprecationWarning')


class Chord:
    """A chord of three members of the task `double`, and its body."""

    def __init__(self, app: Celery, ordered: bool, size: int = _SIZE) -> None:
        app.conf.result_backend_transport_options = {'result_chord_ordered': ordered}
        self.app, self.backend, self.size = app, app.backend, size
        self.task = task_of(app)
        body = app.task(name='seal', shared=False)(_seal)
        self.body = body.s().set(task_id='body')
        self.backend.set_chord_size('g', size)

    def request(self, number: int) -> dict[str, Any]:
        return {
            'id': f'm{number}',
            'group': 'g',
            'group_index': number,
            'chord': self.body,
            'callbacks': None,
            'chain': None,
        }

    def store(self, number: int) -> None:
        """The member's first attempt stores its result."""
        self.backend.store_result(f'm{number}', 6, states.SUCCESS)

    def count(self, number: int) -> None:
        """And is counted."""
        self.backend.on_chord_part_return(
            Context(self.request(number), args=[], kwargs={}), states.SUCCESS, 6
        )

    def again(self, number: int) -> None:
        """Its message comes again, and is a duplicate."""
        with pytest.raises(Ignore):
            in_worker(self.task, **self.request(number))


def _seal(values: list[int]) -> int:
    return sum(values)


@pytest.fixture
def app(redis_server: RedisServer) -> Iterator[Celery]:
    space = redis_server.new_space()
    made = Celery(
        'chords', broker='memory://', backend=redis_server.url(space), set_as_current=False
    )
    JobSync(made, config=CoordinationConfig(), route_producers=False)
    ledger = FakeLedger()
    ledger.begin_error = duplicate()
    set_current_ledger(ledger)
    yield made
    set_current_ledger(None)
    made.backend.client.close()
    made.close()
    redis_server.drop_space(space)


@pytest.fixture
def bodies() -> Iterator[list[Any]]:
    """What each body got that was sent."""
    found: list[Any] = []

    def note(sender: str, body: Any, **_: Any) -> None:
        found.append((sender, body[0]))

    signals.before_task_publish.connect(note)
    yield found
    signals.before_task_publish.disconnect(note)


def check_counted_once(app: Celery, bodies: list[Any], ordered: bool) -> None:
    chord = Chord(app, ordered)
    for number in range(_SIZE):
        chord.store(number)
    chord.count(0)
    chord.again(0)  # one that was counted
    chord.count(1)
    assert bodies == []
    chord.again(2)  # and one that was not
    assert bodies == [('seal', ([6, 6, 6],))]
    for number in range(_SIZE):
        chord.again(number)
    assert len(bodies) == 1


@pytest.mark.parametrize('ordered', [True, False])
def test_each_member_is_counted_once(app: Celery, bodies: list[Any], ordered: bool) -> None:
    check_counted_once(app, bodies, ordered)


def test_without_the_count_the_chord_hangs(
    app: Celery, bodies: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(once_module, 'count_member', lambda *args: True)
    with pytest.raises(AssertionError):
        check_counted_once(app, bodies, True)


def test_a_chord_of_one_is_completed_once(app: Celery, bodies: list[Any]) -> None:
    chord = Chord(app, True, size=1)
    chord.store(0)
    chord.again(0)
    chord.again(0)
    assert bodies == [('seal', ([6],))]


def test_where_somebody_is_about_to_send_the_body_the_member_asks_again(
    app: Celery, bodies: list[Any]
) -> None:
    """From Celery 5.7 on. Whoever holds the claim may be dead, and it runs out."""
    if not hasattr(type(app.backend), '_chord_part_return_script'):
        pytest.skip('this Celery has no claims')
    chord = Chord(app, True)
    for number in range(_SIZE):
        chord.store(number)
    chord.count(0)
    chord.count(1)
    claim = app.backend.get_key_for_group('g', '.c')
    app.backend.client.set(claim, 'of a dead worker')
    chord.again(2)
    assert [sender for sender, _ in bodies] == ['double']  # it comes back
    app.backend.client.delete(claim)
    chord.again(2)
    assert bodies[1:] == [('seal', ([6, 6, 6],))]


@pytest.mark.parametrize('ordered', [True, False])
def test_an_older_celery_s_count_is_taken_back_before_it_is_made_again(
    app: Celery, ordered: bool
) -> None:
    chord = Chord(app, ordered)
    chord.count(0)
    chord.count(1)
    members, client = app.backend.get_key_for_group('g', '.j'), app.backend.client
    _uncount_member(app.backend, members, 'm0')
    left = client.zrange(members, 0, -1) if ordered else client.lrange(members, 0, -1)
    assert [app.backend.decode(entry)[1] for entry in left] == ['m1']


@pytest.mark.parametrize('url', ['db+sqlite://', 'cache+memory://'])
def test_backends_that_do_not_count_members_one_by_one_are_left_alone(url: str) -> None:
    if url.startswith('db'):
        pytest.importorskip('sqlalchemy', reason='sqlalchemy is not installed')
    app = Celery('other', broker='memory://', backend=url, set_as_current=False)
    assert count_member(app.backend, Context({'id': 'm1', 'group': 'g', 'chord': {}}), 6)


def test_a_task_is_what_the_fixture_says(app: Celery) -> None:
    assert isinstance(task_of(app), Task)
