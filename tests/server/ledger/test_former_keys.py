"""Keys that an earlier version completed stay complete under the names that they have now."""

from __future__ import annotations

import pytest

from jobsync_core import CoordinationConfig, Job, exactly_once
from jobsync_core.errors import DuplicateExecution, ExecutionRunning
from jobsync_core.ledger.once import ExactlyOnce
from tests.support.cluster import query

OWN = 'tests.server.ledger.test_former_keys.'
calls: list[tuple[str, str]] = []


@exactly_once(key='{a}:{b}', on_duplicate='result')
def pair(a: str, b: str) -> str:
    calls.append((a, b))
    return f'{a} and {b}'


@exactly_once(key='{a}', on_duplicate='raise', named_later=True)
def charge(a: str) -> str:
    calls.append((a, ''))
    return 'charged'


@exactly_once(key='{a}', scope='shop:eu', on_duplicate='result')
def narrow(a: str) -> str:
    calls.append(('narrow', a))
    return f'narrow {a}'


@exactly_once(key='{a}', scope='shop', on_duplicate='result')
def wide(a: str) -> str:
    calls.append(('wide', a))
    return f'wide {a}'


def complete(config: CoordinationConfig, key: str, state: str = 'done') -> None:
    """What an earlier version left in the ledger."""
    query(
        config,
        """
        INSERT INTO "{}execution" (key, state, node, incarnation, fence, result, expires_at)
        SELECT %s, %s, name, incarnation, 1, '"earlier"', now() + interval '1 day' FROM "{}node"
            RETURNING 1
        """,
        (key, state),
    )


@pytest.fixture(autouse=True)
def _no_calls() -> None:
    calls.clear()


def test_two_calls_whose_keys_read_alike_run_both(config: CoordinationConfig) -> None:
    with Job('a', config, wait_on_enter=0):
        assert pair('acme:7', 'x') == 'acme:7 and x'
        assert pair('acme', '7:x') == 'acme and 7:x'
        assert (pair('acme:7', 'x'), pair('acme', '7:x')) == ('acme:7 and x', 'acme and 7:x')
    assert calls == [('acme:7', 'x'), ('acme', '7:x')]


def test_what_was_complete_before_its_key_was_escaped_is_complete(
    config: CoordinationConfig,
) -> None:
    with Job('a', config, wait_on_enter=0):
        complete(config, f'{OWN}pair:acme:7:x')
        assert pair('acme:7', 'x') == 'earlier'
        assert pair('acme', 'x') == 'acme and x'
    assert calls == [('acme', 'x')]


def test_what_was_complete_under_the_functions_name_is_complete_under_the_tasks(
    config: CoordinationConfig,
) -> None:
    options = vars(charge)['exactly_once']
    assert isinstance(options, ExactlyOnce)
    options.adopt('billing')
    with Job('a', config, wait_on_enter=0):
        complete(config, f'{OWN}charge:1')
        complete(config, f'{OWN}charge:2', 'running')
        with pytest.raises(DuplicateExecution) as caught:
            charge('1')
        assert caught.value.result == 'earlier' and caught.value.key == 'billing:1'
        with pytest.raises(ExecutionRunning):
            charge('2')
        assert charge('3') == 'charged'
        assert query(config, """SELECT state FROM "{}execution" WHERE key = 'billing:3'""") == [
            ('done',)
        ]
        with pytest.raises(DuplicateExecution):
            charge('3')
    assert calls == [('3', '')]


def test_a_former_key_is_not_taken_for_the_present_key_of_another_function(
    config: CoordinationConfig,
) -> None:
    with Job('a', config, wait_on_enter=0):
        assert wide('eu:1') == 'wide eu:1'
        assert narrow('1') == 'narrow 1', (
            "which an earlier version would have written as 'shop:eu:1'"
        )
        assert (wide('eu:1'), narrow('1')) == ('wide eu:1', 'narrow 1')
        complete(config, 'shop:eu:2')
        assert narrow('2') == 'earlier'
    assert calls == [('wide', 'eu:1'), ('narrow', '1')]


def test_a_former_key_is_not_taken_for_the_present_key_of_another_call(
    config: CoordinationConfig,
) -> None:
    with Job('a', config, wait_on_enter=0):
        assert pair('x:', 'y') == 'x: and y'
        assert pair('x%3A', 'y') == 'x%3A and y'
        complete(config, f'{OWN}pair:z%3A:y')
        assert pair('z%3A', 'y') == 'earlier'
    assert calls == [('x:', 'y'), ('x%3A', 'y')]
