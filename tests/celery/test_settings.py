"""The settings in app.conf: each that begins with jobsync_ is one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

from jobsync_celery import JobSync
from jobsync_celery.application import Application
from jobsync_celery.settings import read_settings
from jobsync_core.errors import ConfigurationError

URL = 'postgresql://u@h/d'


def app_with(**conf: Any) -> Celery:
    app = Celery('app', set_as_current=False)
    app.conf.update(jobsync_database_url=URL, **conf)
    return app


@pytest.mark.parametrize(
    ('name', 'near'),
    [
        ('jobsync_park_secs', 'jobsync_park_sec'),
        ('jobsync_aplication', 'jobsync_application'),
        ('jobsync_appnam', 'jobsync_appname'),
        ('jobsync_database_uri', 'jobsync_database_url'),
        ('jobsync_on_rebalanc', 'jobsync_on_rebalance'),
    ],
)
def test_a_misspelt_setting_is_refused_with_the_one_that_is_meant(name: str, near: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        read_settings(app_with(**{name: print if 'on_' in name else 's3cret'}))
    assert (
        str(caught.value)
        == f'app.conf has {name!r}, which is no setting of JobSync: did you mean {near!r}?'
    )


def test_one_that_is_like_none_is_refused_with_all_there_are() -> None:
    with pytest.raises(
        ConfigurationError, match=r"'jobsync_xyzzy'.*remove it.*database_url, .*total_tokens"
    ):
        read_settings(app_with(jobsync_xyzzy=1))


def test_those_that_are_right_are_read_and_others_are_nobodys_business() -> None:
    found = read_settings(
        app_with(
            jobsync_park_sec=3,
            jobsync_appname='shop_',
            jobsync_on_release=print,
            jobs=1,
            my_jobsync_thing=2,
        )
    )
    assert (found.park_sec, found.config.appname, found.on_release) == (3, 'shop_', print)


@pytest.mark.parametrize('namespace', ['CELERY', None])
def test_those_of_a_module_are_looked_at_and_it_is_imported_once(
    namespace: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = f'{namespace}_' if namespace else ''
    wrong, right = (
        f'{prefix}JOBSYNC_{name}' if prefix else f'jobsync_{name.lower()}'
        for name in ('PARK_SECS', 'PARK_SEC')
    )
    url = f'{prefix}JOBSYNC_DATABASE_URL' if prefix else 'jobsync_database_url'
    text = (
        'import jobsync_core\nfrom jobsync_core.task import Task as '
        f'jobsync_task\nprint("loaded")\n{url} = {URL!r}\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    for name, line in (('right_settings', f'{right} = 3\n'), ('wrong_settings', f'{wrong} = 3\n')):
        (tmp_path / f'{name}.py').write_text(text + line)
        monkeypatch.delitem(sys.modules, name, raising=False)
    seen: list[str] = []
    monkeypatch.setattr('builtins.print', seen.append)
    app = Celery('app', set_as_current=False)
    app.config_from_object('right_settings', namespace=namespace)
    assert seen == []
    assert (read_settings(app).park_sec, seen) == (3, ['loaded'])
    app = Celery('app', set_as_current=False)
    app.config_from_object('wrong_settings', namespace=namespace)
    with pytest.raises(ConfigurationError) as caught:
        read_settings(app)
    assert f'app.conf has {wrong!r}' in str(caught.value) and f'did you mean {right!r}?' in str(
        caught.value
    )


def test_what_was_made_from_the_settings_is_made_anew_where_they_are_read_again() -> None:
    app = Celery('app', broker='memory://', set_as_current=False)
    app.conf.update(jobsync_database_url=URL, broker_url='redis://localhost', jobsync_appname='a_')
    JobSync(app)
    application = Application.of(app)
    assert application is not None
    before = application.queues
    app.conf.jobsync_appname = 'b_'
    application.read_again()
    assert before.is_of_cluster('jobsync.a_.n1') and application.queues.is_of_cluster(
        'jobsync.b_.n1'
    )
    assert not application.queues.is_of_cluster('jobsync.a_.n1')
