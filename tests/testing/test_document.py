"""The blocks of docs/TESTING.md are a project with tests: they pass, each of them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from jobsync_core import testing

from ..docs.blocks import ROOT, blocks_of

DOCUMENT = ROOT / 'docs' / 'TESTING.md'


def run_tests(place: Path) -> list[str]:
    """Run a project's tests, which must pass; the file of each of them."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(('JOBSYNC_', 'CELERY_', 'PYTEST_'))
    }
    done = subprocess.run(
        [
            sys.executable,
            '-m',
            'pytest',
            '-v',
            '-W',
            'error',
            '-p',
            'no:cacheprovider',
            '--rootdir',
            str(place),
            str(place),
        ],
        cwd=place,
        env={**environment, 'PYTHONPATH': str(ROOT)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return re.findall(r'^(test_\w+\.py)::\S+ PASSED', done.stdout, re.MULTILINE)


def test_the_project_of_the_document_passes(tmp_path: Path) -> None:
    names = []
    for block in blocks_of(DOCUMENT):
        head, _, _ = block.text.partition('\n')
        name = head.removeprefix('# ')
        assert block.language == 'python' and re.fullmatch(r'\w+\.py', name), block
        assert name not in names, block
        (tmp_path / name).write_text(block.text, encoding='utf-8')
        names.append(name)

    passed = run_tests(tmp_path)

    assert set(passed) == {name for name in names if name.startswith('test_')}
    assert len(passed) == sum(block.text.count('\ndef test_') for block in blocks_of(DOCUMENT))


def test_a_conftest_may_use_the_classes_too(tmp_path: Path) -> None:
    # pytest warns of a plugin that was imported before it could rewrite its assertions.
    (tmp_path / 'conftest.py').write_text(
        'from jobsync_core.testing import FakeJob\npytest_plugins = '
        "['jobsync_core.testing']\nassert FakeJob\n",
        encoding='utf-8',
    )
    (tmp_path / 'test_it.py').write_text(
        "def test_it(jobsync_job):\n    assert jobsync_job.can_claim_task('a')\n", encoding='utf-8'
    )

    assert run_tests(tmp_path) == ['test_it.py']


def test_an_app_without_the_plugin_and_a_worker_of_the_session_work_as_the_document_says(
    tmp_path: Path,
) -> None:
    (tmp_path / 'conftest.py').write_text(
        """
import pytest
from jobsync_core.testing import FakeJob

pytest_plugins = ['jobsync_core.testing', 'celery.contrib.pytest']


@pytest.fixture(scope='session')
def job():
    with FakeJob() as job:
        yield job


@pytest.fixture(scope='session')
def celery_worker_parameters():
    return {'perform_ping_check': False}
""",
        encoding='utf-8',
    )
    (tmp_path / 'test_plain.py').write_text(
        """
from jobsync_celery import exactly_once


def test_plain(jobsync_job, celery_app):
    ran = []

    @celery_app.task(shared=False)
    @exactly_once(key='{n}', scope='plain')
    def run(n):
        ran.append(n)
        return n

    from celery.contrib.testing.worker import start_worker
    with start_worker(celery_app, perform_ping_check=False):
        assert [run.delay(1).get(timeout=10), run.delay(1).get(timeout=10)] == [1, 1]
    assert ran == [1]
    assert jobsync_job.ledger.completed == {'plain:1': 1}
""",
        encoding='utf-8',
    )
    (tmp_path / 'test_session.py').write_text(
        """
import pytest
from jobsync_celery import exactly_once

ran = []


@pytest.fixture(scope='session')
def run(celery_session_app):
    @celery_session_app.task(shared=False)
    @exactly_once(key='{n}', scope='s')
    def run(n):
        ran.append(n)
        return n

    return run


@pytest.mark.parametrize('number', [1, 2])
def test_session(job, run, celery_session_worker, number):
    assert [run.delay(7).get(timeout=10), run.delay(7).get(timeout=10)] == [7, 7]
    assert ran == [7] * number
    job.ledger.forget()
""",
        encoding='utf-8',
    )

    assert run_tests(tmp_path) == ['test_plain.py', 'test_session.py', 'test_session.py']


def test_the_document_names_everything_public() -> None:
    text = DOCUMENT.read_text(encoding='utf-8')
    public = [
        *testing.__all__,
        *(name for kind in (testing.MemoryLedger, testing.Cluster) for name in vars(kind)),
    ]
    shown = {
        'begin',
        'finish',
        'fail',
        'abandon',
        'transaction_of',
        'close',
        'config',
    }  # what the core calls
    assert [
        name
        for name in public
        if not name.startswith('_') and name not in shown and not re.search(rf'\b{name}\b', text)
    ] == []
