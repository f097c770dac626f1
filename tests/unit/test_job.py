"""What a Job refuses before it is entered."""

from __future__ import annotations

import functools
import multiprocessing
import pickle
from collections.abc import Callable
from typing import Any

import psycopg2
import pytest

from jobsync_core.assignment.tokens import TokenSet
from jobsync_core.config import CoordinationConfig
from jobsync_core.errors import ConfigurationError
from jobsync_core.job import Job
from jobsync_core.store import options
from jobsync_core.store.sessions import Sessions
from jobsync_core.worker.entering import make_job
from jobsync_core.worker.settings import PluginSettings

CONFIG = CoordinationConfig()


def two(event: object, other: object) -> None: ...
def named(*, event: object) -> None: ...
def any_number(*args: object) -> None: ...
def optional(event: object = None) -> None: ...
def none() -> None: ...


@pytest.mark.parametrize('config', [None, CONFIG], ids=['single node', 'cluster'])
def test_a_job_is_not_sent_to_another_process(config: CoordinationConfig | None) -> None:
    job = Job('a', config)
    for send in (
        lambda: pickle.dumps(job),
        lambda: multiprocessing.get_context('spawn').Process(target=print, args=(job,)).start(),
    ):
        with pytest.raises(
            ConfigurationError, match=r"Job 'a' .* spawn or forkserver .* a Job of its own there"
        ):
            send()


@pytest.mark.parametrize(
    ('name', 'said'),
    [
        ('sslmod', "did you mean 'sslmode'?"),
        ('aplication_name', "did you mean 'application_name'?"),
        ('appname', 'appname=…, or as the environment variable JOBSYNC_APPNAME'),
        ('schema', 'schema=…, or as'),
        ('minimum_nodes', 'minimum_nodes=…, or as the environment variable JOBSYNC_MINIMUM_NODES'),
        ('minimum_node', 'minimum_nodes=…'),
        ('pasword', 'password=…'),
        ('park_sec', 'JOBSYNC_PARK_SEC'),
        ('xyzzy', 'remove it'),
    ],
)
def test_a_parameter_that_libpq_does_not_know_is_refused_before_anything_is_opened(
    name: str, said: str
) -> None:
    for config in (
        CoordinationConfig.from_url(f'postgresql://u@nowhere.invalid/d?{name}=s3cret'),
        CoordinationConfig(connection_options={name: 's3cret'}),
    ):
        for make in (
            lambda config=config: Job('a', config),
            lambda config=config: Sessions(config, 'b'),
        ):
            with pytest.raises(ConfigurationError) as caught:
                make()
            assert repr(name) in str(caught.value) and said in str(caught.value)
            assert 's3cret' not in f'{caught.value!r}{caught.value.__context__!r}'


@pytest.mark.parametrize('name', ["a'b", 'a b', 'sslmode=x host', 'SSLMODE', ''])
def test_a_name_that_can_be_none_is_refused_too(name: str) -> None:
    with pytest.raises(ConfigurationError, match='no parameter of libpq'):
        Job('a', CoordinationConfig(connection_options={name: 'x'}))


def test_what_libpq_knows_is_accepted() -> None:
    Job(
        'a',
        CoordinationConfig.from_url(
            'postgresql://h/d?sslmode=require&options=-c%20geqo%3Doff&keepalives=0&connect_timeout=3'
        ),
    )
    known = [name for name in options._PARAMETERS if options._is_parameter(name)]
    assert len(known) >= len(options._PARAMETERS) - 6  # which there are, depends on the version


def test_what_nothing_names_is_said_where_it_cannot_be_reached() -> None:
    error = psycopg2.OperationalError('refused')
    lacking = CoordinationConfig.from_env({}, appname='shop_')
    assert options.explain(lacking, 'localhost:5432', error).endswith(
        ': refused (JOBSYNC_DATABASE_URL is not set, so that the default place was tried)'
    )
    missing = psycopg2.OperationalError('database "jobsync" does not exist')
    assert 'JOBSYNC_DATABASE_URL, which is not set' in options.explain(
        lacking, 'localhost:5432', missing
    )
    for config in (
        CoordinationConfig(),
        CoordinationConfig.from_env({'JOBSYNC_HOST': 'h'}),
        CoordinationConfig.from_env({}, dbname='d'),
        CoordinationConfig.from_env({'JOBSYNC_DATABASE_URL': 'postgresql://h/d'}),
    ):
        assert 'not set' not in options.explain(config, 'h:5432', error)


@pytest.mark.parametrize('function', [two, named, lambda a, b, c: None])
def test_a_callback_that_cannot_be_called_is_refused_when_the_job_is_made(
    function: Callable[..., Any],
) -> None:
    settings = (
        PluginSettings(config=CONFIG, on_rebalance=function),
        PluginSettings(config=CONFIG, on_release=function),
    )
    with pytest.raises(
        ConfigurationError, match=r'on_rebalance=.* takes .* RebalanceEvent, or none'
    ):
        Job('a', on_rebalance=function)
    with pytest.raises(ConfigurationError, match=r'on_release=.* takes .* a TokenSet'):
        Job('a', on_release=function)
    for each, said in zip(settings, ('on_rebalance', 'on_release'), strict=True):
        with pytest.raises(ConfigurationError, match=said):
            worker(each)


@pytest.mark.parametrize(
    'function', [any_number, optional, none, functools.partial(two, other=1), print]
)
def test_one_that_can_be_is_not(function: Callable[..., Any]) -> None:
    Job('a', on_rebalance=function)
    worker(PluginSettings(config=CONFIG, on_rebalance=function))


def worker(settings: PluginSettings) -> Job:
    return make_job(
        settings,
        'a',
        {'': 'q'},
        'celery',
        {},
        identify=lambda make: '',
        prepare=lambda: None,
        busy=lambda tokens: False,
        on_rebalance=lambda event: None,
        on_release=lambda tokens: None,
    )


@pytest.mark.parametrize(
    'setting',
    [
        {'clear_existing_locks': 'no'},
        {'clear_existing_locks': None},
        {'resume': 'no'},
        {'weight': 10**400},
        {'wait_on_enter': 10**400},
    ],
)
def test_what_is_no_switch_and_no_number_is_refused(setting: dict[str, Any]) -> None:
    """Taken for True, 'no' would delete locks."""
    with pytest.raises(ConfigurationError, match=next(iter(setting))):
        Job('n', **setting)


def test_a_lock_s_texts_can_be_stored() -> None:
    with Job('n') as job:
        with pytest.raises(ConfigurationError, match='reason'):
            job.register_lock('a', '%', reason='\ud800')
        with pytest.raises(ConfigurationError, match='creator'):
            job.clear_locks_by_creator(5)  # type: ignore[arg-type]


@pytest.mark.parametrize('timeout', ['1', -1, float('nan'), True])
def test_a_drain_waits_for_a_number_of_seconds(timeout: Any) -> None:
    with Job('n') as job, pytest.raises(ConfigurationError, match='timeout='):
        job.drain(timeout)


def test_a_single_node_is_the_only_one_and_there_is_no_table_of_nodes() -> None:
    job = Job('n')
    assert job.nodes == [{'name': 'n'}]
    with job:
        assert (job.nodes, job.get_active_nodes(), job.get_dead_nodes()) == (
            [{'name': 'n'}],
            [],
            [],
        )
        assert (job.my_tokens, job.owner_of('x'), job.am_i_leader(), job.alive) == (
            TokenSet(),
            'n',
            False,
            True,
        )
        assert job.get_coordination_status() == {'coordination_enabled': False}
