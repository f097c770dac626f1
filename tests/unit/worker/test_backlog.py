"""What waits for a queue, put together from what the broker tells."""

from __future__ import annotations

import threading

import pytest

from jobsync_core.worker.backlog import Backlog, BacklogWatch, HomeBacklog, QueueCount, gather
from tests.support.waiting import eventually

_COUNTS = {
    'reports': QueueCount(1, 2, 3, 5.0),
    'reports.jobsync.shop_.n1': QueueCount(10, 4, oldest_sec=9.0),
    'reports.jobsync.shop_.n2': QueueCount(20),
    'reports.jobsync.shop_.parked': QueueCount(100, oldest_sec=7.0),
    'mail.jobsync.shop_.n1': QueueCount(7),
    'jobsync.shop_.n1': QueueCount(5),
    'jobsync.shop_.unknown': QueueCount(6),
}
_KNOWN = [
    'reports.jobsync.shop_.n1',
    'reports.jobsync.shop_.n2',
    'mail.jobsync.shop_.n1',
    'jobsync.shop_.n1',
]


def test_a_queue_is_itself_its_nodes_queues_and_what_is_parked() -> None:
    found = gather(_COUNTS, _KNOWN, ['reports', 'empty'], 'shop_')
    assert [each.queue for each in found.queues] == ['empty', 'mail', 'reports']
    reports = found.of('reports')
    assert reports.shown() == {
        'queue': 'reports',
        'known': True,
        'backlog': 131,
        'total': 137,
        'ready': 31,
        'parked': 100,
        'unacknowledged': 6,
        'delayed': 3,
        'oldest_sec': 9.0,
        'places': {
            'reports': 1,
            'reports.jobsync.shop_.n1': 10,
            'reports.jobsync.shop_.n2': 20,
            'reports.jobsync.shop_.parked': 100,
        },
    }
    assert found.others == {'jobsync.shop_.n1': 5, 'jobsync.shop_.unknown': 6}


def test_what_the_broker_does_not_tell_is_none_and_not_zero() -> None:
    mail = gather(_COUNTS, _KNOWN, [], 'shop_').of('mail')
    assert (mail.known, mail.backlog) == (True, 7)
    assert (mail.unacknowledged, mail.delayed, mail.oldest_sec) == (None, None, None)
    assert mail.shown()['total'] == 7


@pytest.mark.parametrize(('waiting', 'known'), [(0, False), (3, True)])
def test_a_queue_that_nobody_names_is_known_by_what_is_in_it(waiting: int, known: bool) -> None:
    counts = {'new': QueueCount(waiting)} if waiting else {}
    found = gather(counts, [], ['celery'], 'shop_', 'new').of('new')
    assert (found.known, found.backlog) == (known, waiting)
    assert gather(counts, [], ['celery'], 'shop_').of('new').known is False


class Counting:
    """Counts how often it is asked."""

    def __init__(self) -> None:
        self.now = 100.0
        self.asked: list[str | None] = []
        self.error: Exception | None = None
        self.go_on = threading.Event()
        self.go_on.set()
        self.watch = BacklogWatch(self._read, lambda: self.now)

    def _read(self, queue: str | None) -> Backlog:
        self.asked.append(queue)
        assert self.go_on.wait(10)
        if self.error is not None:
            raise self.error
        return Backlog((HomeBacklog('celery', ready=len(self.asked)),), {})


def test_many_who_ask_at_one_time_cost_one_count() -> None:
    counting = Counting()
    for queue in ('celery', None, 'celery'):
        counting.watch.answer(queue)
    assert counting.asked == ['celery']
    counting.now += 2.0
    assert counting.watch.answer('celery')['ready'] == 2


def test_another_queue_that_nobody_names_is_counted_by_itself() -> None:
    counting = Counting()
    for queue in ('celery', 'new', 'new', 'celery'):
        counting.watch.answer(queue)
    assert counting.asked == ['celery', 'new']


def test_a_scrape_waits_for_nobody() -> None:
    counting = Counting()
    counting.go_on.clear()
    assert list(counting.watch.latest()) == []  # the count hangs
    assert list(counting.watch.latest()) == []
    counting.go_on.set()
    eventually(lambda: [each.ready for each in counting.watch.latest()] == [1], 10)
    assert counting.asked == [None]


def test_old_numbers_are_shown_for_two_minutes_and_no_longer(
    caplog: pytest.LogCaptureFixture,
) -> None:
    counting = Counting()
    counting.watch.answer(None)
    counting.error = ConnectionError('the broker is away')
    counting.now += 60
    assert [each.ready for each in counting.watch.latest()] == [1]
    eventually(lambda: 'the broker is away' in caplog.text, 10)
    counting.now += 61
    assert list(counting.watch.latest()) == []
    with pytest.raises(ConnectionError):
        counting.watch.answer(None)
