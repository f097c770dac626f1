"""The manifests for operators ask for what is there."""

from __future__ import annotations

import json
import re
import shlex
import urllib.request
from urllib.parse import urlsplit

from click.testing import CliRunner

from jobsync_core.cli.main import jobsync
from jobsync_core.web.health import HealthServer
from jobsync_core.worker.backlog import Backlog, BacklogWatch, HomeBacklog

from .blocks import ROOT

_MANIFEST = (ROOT / 'examples' / 'operating' / 'keda.yaml').read_text(encoding='utf-8')


def _value(name: str) -> str:
    found = re.search(rf"^ +{name}: '?([^'\s]+)", _MANIFEST, re.MULTILINE)
    assert found is not None, name
    return found[1]


def test_kedas_scaler_finds_its_number() -> None:
    url = urlsplit(_value('url'))
    watch = BacklogWatch(
        lambda queue: Backlog((HomeBacklog('reports', ready=40, parked=2, unacknowledged=3),), {})
    )
    server = HealthServer('127.0.0.1:0', ready=dict, metrics=None, backlog=watch.answer)
    try:
        address = f'http://127.0.0.1:{server.port}{url.path}?{url.query}'
        with urllib.request.urlopen(address, timeout=10) as answer:
            found = json.loads(answer.read())
    finally:
        server.close()
    # A path of GJSON with one name is that of a field.
    assert found[_value('valueLocation')] == 45
    assert float(_value('targetValue')) > 0


def test_the_command_of_the_manifest_exists() -> None:
    (words,) = re.findall(r'command: \[(.+)\]', _MANIFEST)
    given = shlex.split(words.replace(',', ' '))
    command = given[given.index('jobsync') + 1]
    text = CliRunner().invoke(jobsync, [command, '--help']).output
    assert all(word in text for word in given if word.startswith('--'))
