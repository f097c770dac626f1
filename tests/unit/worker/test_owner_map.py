"""What the owner map knows of a route in a home queue, by rows on the number line."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import pytest

from jobsync_core.assignment.groups import GROUP_SPAN
from jobsync_core.assignment.hashing import HASH_FUNCTIONS
from jobsync_core.store.queues import Owners, QueueStore
from jobsync_core.store.tables import Tables
from jobsync_core.worker.owners import OwnerMap, Place
from jobsync_core.worker.pinned import Pinned

TOTAL = 100
#: Tokens of `gpu` and of `mail`, in halves.
GPU, MAIL = 3 * GROUP_SPAN, 5 * GROUP_SPAN
FOUND = Owners(
    version=7,
    total_tokens=TOTAL,
    hash_function='double_sha256',
    groups={'': 0, 'gpu': 3, 'mail': 5, 'left': 6, 'new': 7},
    deserted=frozenset({'left'}),
    rows=(
        (0, TOTAL, 'plain', False),
        (GPU, GPU + 50, 'n1', False),
        (GPU + 50, GPU + TOTAL, 'n2', False),
        (MAIL, MAIL + 50, None, True),
        (MAIL + 50, MAIL + TOTAL, None, False),
        (6 * GROUP_SPAN, 6 * GROUP_SPAN + TOTAL, None, True),
    ),
    queues={('n1', 'gpu'): 'q1', ('n1', 'mail'): 'q1.mail', ('plain', ''): 'q0'},
)


def token(route: str) -> int:
    return HASH_FUNCTIONS['double_sha256'](route.encode()) % TOTAL


LOW = next(f'k{number}' for number in range(99) if token(f'k{number}') < 50)
HIGH = next(f'k{number}' for number in range(99) if token(f'k{number}') >= 50)


class Database:
    """Sessions whose statement gives what a test says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.known: list[int] = []
        self.found: Owners | None = FOUND
        monkeypatch.setattr(QueueStore, 'owners', lambda store, known: self._answer(known))

    def _answer(self, known: int) -> Owners | None:
        self.known.append(known)
        return self.found if self.found is None or known != self.found.version else None

    @contextmanager
    def session(self) -> Any:
        yield None


@pytest.fixture
def database(monkeypatch: pytest.MonkeyPatch) -> Database:
    return Database(monkeypatch)


def owner_map(database: Any, **options: Any) -> OwnerMap:
    made = OwnerMap(database, Tables('shop_'), **options)
    assert made.refresh()
    return made


def test_a_route_is_looked_up_in_the_group_of_its_queue(database: Database) -> None:
    found = owner_map(database)
    assert found.find(LOW, 'gpu') == Place('n1', 'q1')
    assert found.find(HIGH, 'gpu') == Place('n2', None), 'it takes no messages of this queue'
    assert found.find(LOW) == Place('plain', 'q0')


def test_it_is_known_how_many_consume_a_queue(database: Database) -> None:
    found = owner_map(database)
    assert [found.consumers_of(home) for home in ('gpu', 'mail', 'left')] == [1, 1, 0]


def test_queues_of_one_group_have_one_owner_and_a_queue_each(database: Database) -> None:
    found = owner_map(database, group_of=lambda home: 'gpu')
    assert found.find(LOW, 'mail') == Place('n1', 'q1.mail')
    assert found.find(LOW, 'gpu') == Place('n1', 'q1')


def test_what_nobody_may_own_is_told_from_what_nobody_owns_yet(database: Database) -> None:
    found = owner_map(database)
    assert found.find(LOW, 'mail') == Place(unmatched=True)
    assert found.find(HIGH, 'mail') == Place()
    assert found.find(LOW, 'new') == Place(), 'it has members, and no plan yet'


@pytest.mark.parametrize('home', ['left', 'unheard'])
def test_a_queue_that_nobody_consumes_is_deserted_whatever_rows_are_left(
    database: Database, home: str
) -> None:
    found = owner_map(database)
    assert found.find(LOW, home) == Place(deserted=True) and found.is_deserted(home)
    assert not found.is_deserted('mail') and not found.is_deserted('')


def test_before_the_first_look_nothing_is_deserted(database: Database) -> None:
    made: Any = OwnerMap(database, Tables('shop_'))  # type: ignore[arg-type]  # all that it needs
    assert made.find(LOW, 'gpu') == Place() and not made.is_deserted('gpu')


def test_an_owner_that_a_pin_does_not_name_does_not_get_what_is_pinned(database: Database) -> None:
    """The row may be of the time before the pin, or have the token of another key."""
    slots = [f'render#{number}' for number in range(99)]
    low = next(route for route in slots if token(route) < 50)
    high = next(route for route in slots if token(route) >= 50)
    pins = {'render': ['n1', 'x-%']}
    found = owner_map(database, pinned=Pinned(pins.get))
    assert found.find(low, 'gpu') == Place('n1', 'q1')
    assert found.find(high, 'gpu') == Place(unmatched=True)
    assert found.find(high.replace('render', 'other'), 'gpu').node, 'no pin of this task'
    assert found.find(HIGH, 'gpu') == Place('n2', None), 'its neighbours go on'


def test_a_queue_that_is_missing_is_asked_for_again_and_only_then(database: Database) -> None:
    found = owner_map(database)
    found.find(LOW, 'gpu')
    found.refresh()
    assert database.known == [-1, 7]
    found.find(HIGH, 'gpu')
    found.refresh()
    found.refresh()
    assert database.known == [-1, 7, -1, 7]


def test_read_anew_it_keeps_what_it_knows_until_it_has_read(database: Database) -> None:
    found = owner_map(database)
    assert found.reread() and database.known == [-1, -1]
    assert found.version == 7
