"""Where `JobSync()` finds its settings: its arguments, Django's settings, the environment."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from ..docs.blocks import ROOT

ASK = """
from jobsync_dramatiq import JobSync

def show(**given):
    settings = JobSync(**given).settings
    config = settings.config
    timeout = float(config.heartbeat_timeout_sec)
    print(config.appname, config.dbname, float(settings.park_sec), timeout)
"""
DJANGO = """
from django.conf import settings
url = 'postgresql://django@db/django'
settings.configure(DRAMATIQ_JOBSYNC={'database_url': url, 'appname': 'shop_', 'park_sec': 7.0})
"""


def run(program: str, environment: Mapping[str, str] = {}) -> str:
    done = subprocess.run(
        [sys.executable, '-W', 'error', '-c', program],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
        env={'PATH': '/usr/bin:/bin', 'PYTHONPATH': str(ROOT), **environment},
    )
    assert done.returncode == 0, done.stdout
    return done.stdout.strip()


def test_from_django_s_settings() -> None:
    pytest.importorskip('django')
    assert run(f'{DJANGO}{ASK}\nshow()') == 'shop_ django 7.0 15.0'


def test_the_environment_adds_what_django_does_not_say_and_arguments_win() -> None:
    pytest.importorskip('django')
    environment = {
        'JOBSYNC_HEARTBEAT_TIMEOUT_SEC': '21',
        'JOBSYNC_PARK_SEC': '9',
        'JOBSYNC_DATABASE_URL': 'postgresql://x@y/z',
    }
    assert run(f'{DJANGO}{ASK}\nshow()', environment) == 'shop_ django 7.0 21.0'
    given = "show(database_url='postgresql://me@here/mine', park_sec=3)"
    assert run(f'{DJANGO}{ASK}\n{given}', environment) == 'shop_ mine 3.0 21.0'


def test_from_a_settings_module_that_nobody_has_read_yet(tmp_path: Path) -> None:
    pytest.importorskip('django')
    (tmp_path / 'shop_settings.py').write_text(
        "JOBSYNC = {'database_url': 'postgresql://django@db/module'}\n"
    )
    environment = {'PYTHONPATH': f'{ROOT}:{tmp_path}', 'DJANGO_SETTINGS_MODULE': 'shop_settings'}
    assert run(f'import django\n{ASK}\nshow()', environment) == 'sync_ module 2.0 15.0'


def test_from_the_environment_alone() -> None:
    assert (
        run(
            f'{ASK}\nshow()',
            {'JOBSYNC_DATABASE_URL': 'postgresql://x@y/z', 'JOBSYNC_APPNAME': 'shop_'},
        )
        == 'shop_ z 2.0 15.0'
    )


def test_what_is_no_mapping_is_refused() -> None:
    pytest.importorskip('django')
    program = f"""
from django.conf import settings
settings.configure(DRAMATIQ_JOBSYNC='postgresql://x@y/z')
{ASK}
from jobsync_core.errors import ConfigurationError
try:
    show()
except ConfigurationError as error:
    print(error)
"""
    assert 'give a dict such as' in run(program)
