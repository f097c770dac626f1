"""I5 under SIGKILL: keys complete once and transactional effects happen once, wherever workers
die.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from jobsync_core.config import CoordinationConfig
from tests.support.ledger_process import EFFECTS, FORMS, Dispatcher, form_of
from tests.support.rows import Rows, rows_of

SEED = int(os.environ.get('JOBSYNC_TEST_SEED', '20240229'))


@pytest.fixture
def rows(config: CoordinationConfig) -> Iterator[Rows]:
    with rows_of(config) as found:
        found.run(EFFECTS.format(execution=found.tables.execution))
        yield found


@dataclass(frozen=True)
class Verdict:
    """What PostgreSQL counted, per key that breaks a promise."""

    completions: dict[str, int]
    transactional: dict[str, int]
    plain_missing: list[str]
    plain_effects: int
    plain_keys: int
    attempts: int

    @property
    def violations(self) -> int:
        return len(self.completions) + len(self.transactional) + len(self.plain_missing)


def check(rows: Rows, keys: list[str]) -> Verdict:
    """Compare what happened to each key with what is promised."""
    completions = Counter(dict(rows.run('SELECT key, count(*) FROM completion GROUP BY key')))
    effects = Counter(dict(rows.run('SELECT key, count(*) FROM effect GROUP BY key')))
    done = {
        key for (key,) in rows.run(f"SELECT key FROM {rows.tables.execution} WHERE state = 'done'")
    }
    plain = [key for key in keys if form_of(key) == 'plain']
    return Verdict(
        completions={
            key: completions[key] for key in keys if completions[key] != 1 or key not in done
        },
        transactional={
            key: effects[key] for key in keys if form_of(key) != 'plain' and effects[key] != 1
        },
        plain_missing=[key for key in plain if effects[key] < 1],
        plain_effects=sum(effects[key] for key in plain),
        plain_keys=len(plain),
        attempts=rows.value(f'SELECT sum(attempts) FROM {rows.tables.execution}'),
    )


def test_keys_complete_once_and_transactional_effects_happen_once_wherever_workers_die(
    rows: Rows, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = [f'{FORMS[number % 3]}-{number}' for number in range(5_000)]
    dispatcher = Dispatcher(rows, SEED)
    began = time.monotonic()
    dispatcher.run(keys)
    took = time.monotonic() - began
    verdict = check(rows, keys)
    with capsys.disabled():
        print(
            f'\nledger under kill: seed={SEED} keys={len(keys)} attempts={verdict.attempts} in '
            f'{took:.1f} s, '
            f'{dict(dispatcher.outcomes)}; plain effects: {verdict.plain_effects} of '
            f'{verdict.plain_keys} keys'
        )
    assert verdict.completions == {}
    assert verdict.transactional == {}
    assert verdict.plain_missing == []
    # Deaths, and late ends of attempts that were taken over, must have been among what was
    # survived.
    assert dispatcher.outcomes['killed'] > 50
    assert dispatcher.outcomes['late fenced'] > 5
    # A plain effect repeats only in another attempt.
    assert verdict.plain_keys < verdict.plain_effects <= verdict.attempts


def test_without_the_fence_at_finish_the_checker_reports_violations(rows: Rows) -> None:
    keys = [f'{FORMS[number % 3]}-{number}' for number in range(150)]
    dispatcher = Dispatcher(rows, SEED, death=0.0, pause=0.2, fenceless=True)
    dispatcher.run(keys)
    assert dispatcher.outcomes['late completed'] > 0
    assert check(rows, keys).violations > 0


def test_with_the_fence_the_same_pauses_do_no_harm(rows: Rows) -> None:
    keys = [f'{FORMS[number % 3]}-{number}' for number in range(150)]
    dispatcher = Dispatcher(rows, SEED, death=0.0, pause=0.2)
    dispatcher.run(keys)
    assert dispatcher.outcomes['late fenced'] > 0
    assert check(rows, keys).violations == 0
