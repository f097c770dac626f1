"""When workers pause because the database refuses to begin anything, for how long, and who tries
after that.
"""

from __future__ import annotations

import os

import pytest

from jobsync_core.errors import DatabaseRefused
from jobsync_core.ledger.cluster import ClusterLedger
from jobsync_core.ledger.current import message_ledger, set_current_ledger
from jobsync_core.protocol.ownership import Ownership
from jobsync_core.protocol.pausing import FIRST_SEC, MOST_SEC, PROBE_SEC, Pausing, remedy
from tests.support import attempts as by_hand

pytestmark = pytest.mark.filterwarnings(
    'ignore:This process .* is multi-threaded:DeprecationWarning'
)

FULL = DatabaseRefused('no space left', '53100', True)


def refusing(times: int = 1) -> tuple[Pausing, float]:
    """A pause, after so many tries that each came when the one before was over; and the time of the
    last one.
    """
    pausing, now = Pausing(), 1000.0
    for _ in range(times):
        now = max(now, pausing.until)
        pausing.refused(FULL, now)
    return pausing, now


def test_a_node_begins_without_a_pause() -> None:
    pausing = Pausing()
    assert not pausing.is_paused(0.0) and pausing.length == 0
    assert pausing.admits(1.0) and pausing.admits(1.0)


def test_the_pause_doubles_while_refusals_go_on_and_is_bounded() -> None:
    assert [refusing(times)[0].length for times in range(1, 7)] == [5, 10, 20, 40, 60, 60]
    pausing, now = refusing(6)
    assert pausing.until == now + MOST_SEC


def test_refusals_of_what_was_asked_before_the_pause_do_not_lengthen_it() -> None:
    pausing, now = refusing()
    for _ in range(50):
        pausing.refused(FULL, now + 0.1)
    assert (pausing.length, pausing.until) == (FIRST_SEC, now + FIRST_SEC)


def test_a_begin_that_is_answered_ends_it_and_the_next_one_is_short() -> None:
    pausing, now = refusing(4)
    pausing.answered()
    assert not pausing.is_paused(now) and pausing.admits(now) and pausing.admits(now)
    pausing.refused(FULL, now)
    assert pausing.length == FIRST_SEC


def test_a_trouble_long_afterwards_is_another_one() -> None:
    pausing, _ = refusing(5)
    pausing.refused(FULL, pausing.until + MOST_SEC + 1)
    assert pausing.length == FIRST_SEC


def test_in_the_pause_nobody_begins_and_after_it_one_tries() -> None:
    pausing, now = refusing()
    assert not pausing.admits(now + FIRST_SEC - 0.1)
    after = now + FIRST_SEC
    assert [pausing.admits(after) for _ in range(4)] == [True, False, False, False]
    pausing.refused(FULL, after + 1)
    assert not pausing.admits(after + 1 + PROBE_SEC)
    assert [pausing.admits(pausing.until) for _ in range(2)] == [True, False]


def test_a_try_that_never_reaches_the_database_is_followed_by_another() -> None:
    pausing, now = refusing()
    after = now + FIRST_SEC
    assert pausing.admits(after)
    assert not pausing.admits(after + PROBE_SEC - 0.1)
    assert [pausing.admits(after + PROBE_SEC) for _ in range(2)] == [True, False]


def test_what_a_forked_child_hears_counts_for_its_node() -> None:
    ownership = Ownership(100)
    pid = os.fork()
    if not pid:
        ownership.pausing.refused(FULL, 1000.0)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    assert ownership.pausing.is_paused(1004.9) and not ownership.pausing.is_paused(1005.0)
    error = ownership.pausing.error
    assert (str(error), error.sqlstate, error.pause, error.sent) == (
        'no space left',
        '53100',
        True,
        False,
    )
    assert not ownership.may_claim(0, 0.0) and ownership.incarnation == ''


def test_a_long_reason_is_cut() -> None:
    pausing = Pausing()
    pausing.refused(DatabaseRefused('ü' * 1000, '53100', True), 1.0)
    assert str(pausing.error).strip('ü') == '' and len(str(pausing.error)) == 128


@pytest.mark.parametrize(
    ('sqlstate', 'expected'),
    [
        ('53100', 'disk space'),
        ('42501', 'jobsync doctor'),
        ('58030', 'log of the database server'),
        ('', 'jobsync doctor'),
    ],
)
def test_the_remedy_is_named(sqlstate: str, expected: str) -> None:
    assert expected in remedy(sqlstate)


class Refuses:
    """In place of the ledger's calls: a server, full or not."""

    full = True
    asked = 0

    def begin(self, key: str, holder: object, max_lost: int | None) -> object:
        self.asked += 1
        if self.full:
            raise FULL
        raise DatabaseRefused('bad value', '22P05', False)


def test_a_message_does_not_ask_in_a_pause_and_only_what_lasts_begins_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Sessions:
        longest_call_sec = 1.0

    ledger = ClusterLedger(Sessions(), None, 'n1', lambda: 'life-1')  # type: ignore[arg-type]  # all that it needs
    calls = Refuses()
    vars(ledger)['_calls'] = calls
    set_current_ledger(ledger)
    try:
        calls.full = False
        for _ in range(2):
            with pytest.raises(DatabaseRefused, match='bad value'):
                by_hand.begin(message_ledger(), 'k', 60)
        calls.full = True
        with pytest.raises(DatabaseRefused, match='no space left'):
            by_hand.begin(message_ledger(), 'k', 60)
        assert calls.asked == 3 and ledger.pausing.length == FIRST_SEC
        with pytest.raises(DatabaseRefused, match='no space left'):
            message_ledger()
        assert calls.asked == 3
    finally:
        set_current_ledger(None)
        ledger.close()
