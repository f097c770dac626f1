"""Which tasks are coordinated, by what was declared of them."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from jobsync_core.config import CoordinationConfig
from jobsync_core.errors import ConfigurationError
from jobsync_core.worker.adapter import CoordinatedTasks, Declared
from jobsync_core.worker.settings import PluginSettings

SETTINGS = PluginSettings(config=CoordinationConfig(), pins={'render': ('gpu-%',)})


def pay() -> None:
    """A task."""


def tasks(pin: Sequence[str] | str | None) -> CoordinatedTasks:
    return CoordinatedTasks(
        SETTINGS, lambda name: Declared(pay, None, None, pin), lambda: ['pay', 'render']
    )


def test_a_task_s_own_pin_counts_before_that_of_the_settings() -> None:
    assert tasks(None).pins() == {'render': ('gpu-%',)}
    assert tasks(['one']).pins() == {'pay': ('one',), 'render': ('one',)}


@pytest.mark.parametrize('pin', [[], (), ''])
def test_an_empty_pin_is_refused(pin: Sequence[str] | str) -> None:
    with pytest.raises(ConfigurationError, match=r'^pay: jobsync_pin=.* at least one pattern'):
        tasks(pin).pins()
