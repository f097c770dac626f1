"""A member of a chord whose first attempt was killed before it was counted, with the results in
Django's database (`django-db`).
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from billiard.exceptions import WorkerLostError
from celery import Celery, chord, signals, states
from celery.app.task import Context
from celery.exceptions import Ignore

from jobsync_celery import JobSync
from jobsync_celery.tasks import once as once_module
from jobsync_celery.tasks.chords import Step, count_member, next_step
from jobsync_celery.tasks.lost_members import comes_back, count_lost
from jobsync_core.config import CoordinationConfig
from jobsync_core.ledger.current import set_current_ledger
from tests.support.fakes import FakeLedger, duplicate
from tests.support.waiting import eventually

from .test_once import in_worker, task_of

_SIZE = 3


@pytest.mark.parametrize(
    ('counter_exists', 'all_ready', 'step'),
    [
        (False, False, Step.DONE),
        (False, True, Step.DONE),
        (True, False, Step.WAIT),
        (True, True, Step.TRIGGER),
    ],
)
def test_a_chord_is_done_without_its_counter_and_triggered_when_all_is_there(
    counter_exists: bool, all_ready: bool, step: Step
) -> None:
    assert next_step(counter_exists, all_ready) is step


class Chord:
    """A chord of three members of the task `double`, as its sender has registered it."""

    def __init__(self, app: Celery) -> None:
        self.app, self.backend, self.task = app, app.backend, task_of(app)
        self.body = app.task(name='seal', shared=False)(_seal).s().set(task_id='body')
        self.register('g')

    def register(self, group: str) -> None:
        self.backend.apply_chord(
            (group, [self.app.AsyncResult(f'm{number}') for number in range(_SIZE)]), self.body
        )

    def request(self, number: int) -> dict[str, Any]:
        return {
            'id': f'm{number}',
            'group': 'g',
            'group_index': number,
            'chord': self.body,
            'callbacks': None,
            'chain': None,
        }

    def store(self, *numbers: int) -> None:
        for number in numbers:
            self.backend.store_result(f'm{number}', 6, states.SUCCESS)

    def count(self, number: int) -> None:
        self.backend.on_chord_part_return(
            Context(self.request(number), args=[], kwargs={}), states.SUCCESS, 6
        )

    def again(self, number: int, **more: Any) -> None:
        """Its message comes again, and is a duplicate."""
        with pytest.raises(Ignore):
            in_worker(self.task, **self.request(number), **more)


def _seal(values: list[int]) -> int:
    return sum(values)


@pytest.fixture(scope='module')
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    django = pytest.importorskip('django', reason='django is not installed')
    pytest.importorskip('django_celery_results', reason='django-celery-results is not installed')
    from django.apps import apps
    from django.conf import settings
    from django.core.management import call_command
    from django.db import connections

    if not settings.configured:  # once in a process, and other tests use Django, too
        settings.configure()
    django.setup()
    apps.set_installed_apps(['django_celery_results'])
    file = tmp_path_factory.mktemp('django') / 'results.sqlite3'
    former = connections.settings
    connections.settings = connections.configure_settings(
        {**former, 'default': {'ENGINE': 'django.db.backends.sqlite3', 'NAME': str(file)}}
    )
    del connections['default']
    call_command('migrate', verbosity=0)
    yield
    connections.close_all()
    del connections['default']
    connections.settings = former
    apps.unset_installed_apps()


@pytest.fixture
def app(database: None) -> Iterator[Celery]:
    made = Celery('chords', broker='memory://', backend='django-db', set_as_current=False)
    JobSync(made, config=CoordinationConfig(), route_producers=False)
    ledger = FakeLedger()
    ledger.begin_error = duplicate()
    set_current_ledger(ledger)
    yield made
    set_current_ledger(None)
    made.close()
    from django_celery_results.models import ChordCounter, TaskResult

    ChordCounter.objects.all().delete()
    TaskResult.objects.all().delete()


@pytest.fixture
def sent() -> Iterator[list[Any]]:
    """The tasks that were sent, and the first of their arguments."""
    found: list[Any] = []

    def note(sender: str, body: Any, **_: Any) -> None:
        found.append((sender, body[0][0] if body[0] else None))

    signals.before_task_publish.connect(note)
    yield found
    signals.before_task_publish.disconnect(note)


def counters() -> int:
    from django_celery_results.models import ChordCounter

    return int(ChordCounter.objects.count())


def check_completes(app: Celery, sent: list[Any]) -> None:
    members = Chord(app)
    members.store(0, 1)
    members.count(1)
    members.again(0)  # nobody can tell that it was not counted: it waits for the others
    assert sent == [('double', 3)]
    members.store(2)
    members.count(2)
    assert len(sent) == 1 and counters() == 1  # the chord hangs by one count
    members.again(0)
    assert sent[1:] == [('seal', [6, 6, 6])] and counters() == 0
    members.again(0)
    members.count(0)
    assert len(sent) == 2


def test_a_member_that_was_not_counted_completes_the_chord_once(
    app: Celery, sent: list[Any]
) -> None:
    check_completes(app, sent)


def test_without_the_count_the_chord_hangs(
    app: Celery, sent: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(once_module, 'count_member', lambda *args: True)
    with pytest.raises(AssertionError):
        check_completes(app, sent)


def test_a_member_that_was_counted_does_not_count_for_another(app: Celery, sent: list[Any]) -> None:
    members = Chord(app)
    members.store(0, 1)
    members.count(0)
    members.count(1)
    members.again(0)
    assert sent == [('double', 3)] and counters() == 1
    members.store(2)
    members.again(0)  # the third is about to count, and finds no counter
    members.count(2)
    assert sent[1:] == [('seal', [6, 6, 6])]


def test_a_chord_with_a_failed_member_fails_once(app: Celery, sent: list[Any]) -> None:
    members = Chord(app)
    members.store(0, 1)
    app.backend.store_result('m2', ValueError('no'), states.FAILURE)
    members.again(0)
    assert sent == [] and counters() == 0
    assert app.backend.get_task_meta('body')['status'] == states.FAILURE


def test_who_dies_between_the_body_and_the_commit_leaves_the_chord_to_the_next(
    app: Celery, sent: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from django_celery_results.backends import database

    members = Chord(app)
    members.store(0, 1, 2)

    def dying(**_: Any) -> None:
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(database, 'trigger_callback', dying)
        with pytest.raises(SystemExit):
            count_member(app.backend, Context(members.request(0)), 6)
    assert counters() == 1
    members.again(0)
    assert sent == [('seal', [6, 6, 6])] and counters() == 0


def test_a_body_that_is_a_chord_goes_out_when_the_lock_is_gone(
    app: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    from django.db import connection
    from django_celery_results.backends import database

    members = Chord(app)
    members.store(0, 1, 2)
    locked: list[bool] = []
    monkeypatch.setattr(
        database, 'trigger_callback', lambda **_: locked.append(connection.in_atomic_block)
    )
    for body in (
        members.body,
        chord([members.body.clone(), members.body.clone()], members.body.clone()),
    ):
        assert count_member(app.backend, Context({**members.request(0), 'chord': body}), 6)
        members.register('g')
    assert locked == [True, False]


def test_trouble_with_the_back_end_brings_the_message_back(
    app: Celery, sent: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> bool:
        raise OSError('no connection')

    monkeypatch.setattr(once_module, 'count_member', fails)
    members = Chord(app)
    members.store(0)
    members.again(0)
    assert sent == [('double', 3)]


def test_a_message_gives_up_before_its_key_is_forgotten(
    app: Celery, sent: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    members = Chord(app)
    members.store(0)
    day = 2 * 24 * 60  # come-backs, half a minute each
    members.again(0, jobsync_waits=3 * day)
    assert sent == [('double', 3)]
    members.again(0, jobsync_waits=4 * day)
    assert len(sent) == 1 and 'is counted no more' in caplog.text


def lost(members: Chord, number: int, task: Any, **more: Any) -> Any:
    """The worker's request of a member whose process was killed."""
    return SimpleNamespace(
        id=f'm{number}',
        name=task.name,
        task=task,
        _context=Context(members.request(number)),
        **more,
    )


_KILLED = SimpleNamespace(exception=WorkerLostError('killed'))


def test_celery_does_not_acknowledge_a_member_whose_process_is_lost(app: Celery) -> None:
    """Newer Celerys do, if its result is stored."""
    members = Chord(app)
    assert not comes_back(
        lost(members, 0, members.task, acknowledged=False), _KILLED
    )  # it runs again
    members.store(0)
    assert comes_back(lost(members, 0, members.task, acknowledged=False), _KILLED)
    plain = app.task(name='plain', shared=False)(_seal)
    assert not comes_back(
        lost(members, 0, plain, acknowledged=False), _KILLED
    )  # it would run again
    assert not comes_back(
        lost(members, 0, members.task, acknowledged=False), SimpleNamespace(exception=ValueError())
    )


def test_a_plain_member_that_is_acknowledged_is_counted_when_the_others_are_ready(
    app: Celery, sent: list[Any]
) -> None:
    members = Chord(app)
    members.store(0)
    plain = app.task(name='plain', shared=False)(_seal)
    count_lost(lost(members, 0, plain, acknowledged=True), _KILLED)
    assert sent == [] and counters() == 1
    members.store(1, 2)
    members.count(1)
    members.count(2)
    eventually(lambda: sent == [('seal', [6, 6, 6])] and counters() == 0)
