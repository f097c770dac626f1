"""The documents name everything that is public, give the true defaults, and their links lead
somewhere.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path

import pytest

import jobsync_core
from jobsync_core import CoordinationConfig, Job, exactly_once

from .blocks import ROOT

DOCUMENTS = [ROOT / name for name in ('README.md', 'CHANGELOG.md', 'CONTRIBUTING.md')] + sorted(
    (ROOT / 'docs').glob('*.md')
)
GUIDE = (ROOT / 'docs' / 'USAGE_GUIDE.md').read_text(encoding='utf-8')


def anchors(path: Path) -> set[str]:
    """Anchors of a document's headings, as code hosts make them."""
    heads = re.findall(r'^#+ (.+)$', path.read_text(encoding='utf-8'), re.MULTILINE)
    return {re.sub(r'[^\w\- ]', '', head.lower()).replace(' ', '-') for head in heads}


@pytest.mark.parametrize('path', DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r'\]\(([^)\s]+)\)', path.read_text(encoding='utf-8')):
        if target.startswith('https://'):
            continue
        name, _, anchor = target.partition('#')
        file = (path.parent / name).resolve() if name else path
        assert file.exists(), f'{path.name}: {target}'
        assert not anchor or anchor in anchors(file), f'{path.name}: {target}'


def test_the_usage_guide_names_everything_public() -> None:
    names = [*jobsync_core.__all__, *(name for name in dir(Job) if not name.startswith('_'))]
    assert [name for name in names if not re.search(rf'\b{name}\b', GUIDE)] == []


def test_the_usage_guide_names_every_parameter_of_the_job_and_its_default() -> None:
    parameters = inspect.signature(Job).parameters.values()
    printed = re.search(r'^`Job\((.*)\)`$', GUIDE, re.MULTILINE)
    assert printed is not None
    words = [f'{p.name}={p.default!r}' if p.default is not p.empty else p.name for p in parameters]
    assert [word for word in printed[1].split(', ') if word != '*'] == words
    assert [
        p.name for p in parameters if not re.search(rf'^\| `{p.name}` ', GUIDE, re.MULTILINE)
    ] == []


def test_the_usage_guide_gives_every_setting_with_its_true_default() -> None:
    rows = {
        name: default
        for names, default in re.findall(
            r'^\| (`\w+`(?:, `\w+`)*) \| ([^|]+) \| [^|]+ \|$', GUIDE, re.MULTILINE
        )
        for name, default in zip(
            re.findall(r'`(\w+)`', names), re.findall(r'`([^`]+)`', default), strict=False
        )
    }
    for field in dataclasses.fields(CoordinationConfig):
        default = field.default if field.default is not dataclasses.MISSING else {}
        assert eval(rows[field.name]) == default, field.name


def test_the_usage_guide_names_every_option_of_exactly_once() -> None:
    options = [
        name
        for name in inspect.signature(exactly_once).parameters
        if name
        not in (
            'bare',
            'default_key',
            'refuse',
            'ledger',
            'completes',
            'check_result',
            'as_sent',
            'named_later',
            'affinity',
        )
    ]
    assert [name for name in options if not re.search(rf'^\| `{name}` ', GUIDE, re.MULTILINE)] == []


def test_the_command_table_names_every_command() -> None:
    click = pytest.importorskip('click', reason='the command line needs click')
    from jobsync_core.cli.main import jobsync

    text = (ROOT / 'docs' / 'OPERATOR_GUIDE.md').read_text(encoding='utf-8')
    assert isinstance(jobsync, click.Group)
    assert [
        name for name in jobsync.commands if not re.search(rf'`(jobsync )?{name}\b', text)
    ] == []
