"""A message that was a dead letter tells its task how often, over all of its copies."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from jobsync_celery.broker.deaths import DEATHS, KEPT_DEATHS, as_it_came, deaths_of, show_deaths
from jobsync_core.worker.returns import COUNT, returns_of
from jobsync_core.worker.routing import RETURNS


def _death(queue: str, count: object, reason: str = 'rejected', **more: object) -> dict[str, Any]:
    return {'queue': queue, 'reason': reason, 'count': count, **more}


@pytest.mark.parametrize(
    ('headers', 'expected'),
    [
        ({}, []),
        ({DEATHS: [_death('work', 1)]}, [_death('work', 1)]),
        ({KEPT_DEATHS: [_death('work', 2)]}, [_death('work', 2)]),
        (
            {
                DEATHS: [_death('wait', 1, 'expired', time=2), _death('work', 1, time=2)],
                KEPT_DEATHS: [_death('work', 2, time=1), _death('other', 1)],
            },
            [_death('wait', 1, 'expired', time=2), _death('work', 3, time=2), _death('other', 1)],
        ),
        # whatever somebody writes there
        ({DEATHS: 'many', KEPT_DEATHS: None}, []),
        ({DEATHS: [None, _death('work', '1'), _death('work', True), {'count': 1}]}, [{'count': 1}]),
        ({DEATHS: [_death('work', -(2**63))]}, []),
        ({KEPT_DEATHS: [_death('work', 2**63 - 1)] * 2}, [_death('work', 2**31 - 1)]),
    ],
)
def test_deaths_of_copies_are_added_up(
    headers: dict[str, Any], expected: list[dict[str, Any]]
) -> None:
    assert deaths_of(headers) == expected


def test_a_task_sees_them_where_rabbitmq_shows_them() -> None:
    message = SimpleNamespace(
        headers={DEATHS: [_death('work', 1)], KEPT_DEATHS: [_death('work', 2)]}
    )
    show_deaths(message)
    assert message.headers == {DEATHS: [_death('work', 3)]}
    show_deaths(message)
    show_deaths(SimpleNamespace(headers=None))
    assert message.headers == {DEATHS: [_death('work', 3)]}


@pytest.mark.parametrize(('dead', 'expected'), [({}, 4), ({DEATHS: [_death('work', 1)]}, 1)])
def test_what_a_task_sees_makes_no_dead_letter_of_a_copy(
    dead: dict[str, Any], expected: int
) -> None:
    """How often it came back goes along with a copy of a dead letter, and begins anew with one."""
    message = SimpleNamespace(
        headers={**dead, KEPT_DEATHS: [_death('work', 2)], RETURNS: 3, COUNT: 1}
    )
    for _ in range(2):
        show_deaths(message)
        assert returns_of(as_it_came(message)) == expected and DEATHS in message.headers
    plain = SimpleNamespace(headers={RETURNS: 3, COUNT: 1})
    show_deaths(plain)
    assert returns_of(as_it_came(plain)) == 4
