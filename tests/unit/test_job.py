"""What a Job refuses before it is entered."""
from __future__ import annotations

import functools
import multiprocessing
import pickle
from collections.abc import Callable
from typing import Any

import pytest

from jobsync_core.config import CoordinationConfig
from jobsync_core.errors import ConfigurationError
from jobsync_core.job import Job
from jobsync_core.plugin import PluginSettings, make_job

CONFIG = CoordinationConfig()


def two(event: object, other: object) -> None: ...
def named(*, event: object) -> None: ...
def any_number(*args: object) -> None: ...
def optional(event: object = None) -> None: ...
def none() -> None: ...


@pytest.mark.parametrize('config', [None, CONFIG], ids=['single node', 'cluster'])
def test_a_job_is_not_sent_to_another_process(config: CoordinationConfig | None) -> None:
    job = Job('a', config)
    for send in (lambda: pickle.dumps(job), lambda: multiprocessing.get_context('spawn').Process(target=print, args=(job,)).start()):
        with pytest.raises(ConfigurationError, match=r"Job 'a' .* spawn or forkserver .* a Job of its own there"):
            send()


@pytest.mark.parametrize('function', [two, named, lambda a, b, c: None])
def test_a_callback_that_cannot_be_called_is_refused_when_the_job_is_made(function: Callable[..., Any]) -> None:
    settings = PluginSettings(config=CONFIG, on_rebalance=function), PluginSettings(config=CONFIG, on_release=function)
    with pytest.raises(ConfigurationError, match=r'on_rebalance=.* takes .* RebalanceEvent, or none'):
        Job('a', on_rebalance=function)
    with pytest.raises(ConfigurationError, match=r'on_release=.* takes .* a TokenSet'):
        Job('a', on_release=function)
    for each, said in zip(settings, ('on_rebalance', 'on_release'), strict=True):
        with pytest.raises(ConfigurationError, match=said):
            worker(each)


@pytest.mark.parametrize('function', [any_number, optional, none, functools.partial(two, other=1), print])
def test_one_that_can_be_is_not(function: Callable[..., Any]) -> None:
    Job('a', on_rebalance=function)
    worker(PluginSettings(config=CONFIG, on_rebalance=function))


def worker(settings: PluginSettings) -> Job:
    return make_job(settings, 'a', 'q', 'celery', {}, identify=lambda make: '', prepare=lambda: None, busy=lambda tokens: False,
                    on_rebalance=lambda event: None, on_release=lambda tokens: None)
