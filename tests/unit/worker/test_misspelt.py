"""Names that mean nothing: which are reported, and what is offered in their place."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from jobsync_core.worker.misspelt import misspelt

KNOWN = ('jobsync_key', 'jobsync_pin')


@pytest.mark.parametrize(
    ('options', 'expected'),
    [
        (
            ['jobsync_keys'],
            ['task pay: its option jobsync_keys means nothing: did you mean jobsync_key?'],
        ),
        (
            ['jobsync_pins'],
            ['task pay: its option jobsync_pins means nothing: did you mean jobsync_pin?'],
        ),
        (
            ['jobsynckey'],
            ['task pay: its option jobsynckey means nothing: did you mean jobsync_key?'],
        ),
        (
            ['job_sync_pin'],
            ['task pay: its option job_sync_pin means nothing: did you mean jobsync_pin?'],
        ),
        (
            ['jobsync_exclusive_rights_of_men'],
            ['task pay: its option jobsync_exclusive_rights_of_men means nothing'],
        ),
        (
            ['jobsync_affinity'],
            [
                (
                    'task pay: its option jobsync_affinity means nothing: write '
                    '@exactly_once(affinity=…) in its place'
                )
            ],
        ),
        (['jobsync_key', 'jobsync_pin', 'key', 'pin', 'rate_limit', 'job'], []),
    ],
)
def test_an_option_that_means_nothing(options: Iterable[str], expected: list[str]) -> None:
    assert misspelt({'pay': options}, KNOWN) == expected


def test_a_pin_of_a_task_that_is_not_there() -> None:
    assert misspelt(
        {}, KNOWN, {'shop.bil': [], 'shop.pay': [], 'zzz': []}, ['shop.bill', 'shop.pay'], 'actor'
    ) == [
        'pins: there is no actor shop.bil here: did you mean shop.bill?',
        'pins: there is no actor zzz here',
    ]


def test_names_are_shown_on_one_line() -> None:
    assert all(line.isprintable() for line in misspelt({'a\nb': ['jobsync_\n']}, KNOWN, ['c\nd']))
