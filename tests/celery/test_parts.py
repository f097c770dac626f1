"""What the plugin uses of Celery, kombu and redis-py that is not promised to stay."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest
from celery import VERSION, Celery
from kombu.transport import redis as transport

from jobsync_celery import parts
from jobsync_celery.settings import read_settings
from jobsync_core.errors import ConfigurationError
from jobsync_core.worker.parts import missing as lacking
from tests.support.private_parts import foreign_names, names_in

_PAGE = Path(__file__).parents[2] / 'docs' / 'CELERY.md'
#: Kombu's poller calls the listener by these.
_USED_BY_KOMBU = {'fds', 'on_readable'}
_URL = 'postgresql://u:p@127.0.0.1:1/d'


@pytest.mark.parametrize('part', parts.PARTS, ids=lambda part: f'{part.owner}-{part.use}')
def test_the_installed_versions_have_it(part: parts.Part) -> None:
    lacking = [name for name in parts.missing((part.use,)) if name.startswith(f'{part.owner}.')]
    assert not lacking, f'{part.use} needs {lacking}, which this version lacks'


def test_the_page_has_the_same_table() -> None:
    rows = re.findall(
        r'^\| ([^|]+) \| `([\w.:]+)` \| ((?:`\w+`(?:, )?)+) \|$',
        _PAGE.read_text(encoding='utf-8'),
        re.MULTILINE,
    )
    assert [
        (use, owner, tuple(re.findall(r'`(\w+)`', names))) for use, owner, names in rows
    ] == list(map(tuple, (*parts.PARTS, *parts.NEWER)))


@pytest.mark.skipif(VERSION < (5, 7), reason='of newer versions')
@pytest.mark.parametrize('part', parts.NEWER, ids=lambda part: f'{part.owner}-{part.use}')
def test_the_newer_versions_have_what_is_used_of_them(part: parts.Part) -> None:
    assert lacking([part]) == []


def test_whatever_private_part_is_used_is_listed() -> None:
    listed = {name for part in (*parts.PARTS, *parts.NEWER) for name in part.names}
    used = foreign_names('jobsync_celery')
    assert {name: where for name, where in used.items() if name not in listed} == {}


def test_whatever_is_listed_is_used() -> None:
    listed = {name for part in (*parts.PARTS, *parts.NEWER) for name in part.names}
    assert listed - names_in('jobsync_celery') == _USED_BY_KOMBU


@pytest.mark.parametrize('name', ['_brpop_start', 'ack_emulation'])
def test_what_is_gone_is_named(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.delattr(transport.Channel, name)
    assert f'kombu.transport.redis:Channel.{name}' in parts.missing((parts.RECEIVE,))


def test_what_an_instance_gets_is_found_and_missed() -> None:
    assert parts.missing((parts.RECEIVE,)) == []
    poller = 'kombu.transport.redis:MultiChannelPoller'
    wrong = parts.Part('x', poller, ('_fd_to_chan', '_fd_to_channel'))
    assert lacking([wrong]) == [f'{poller}._fd_to_channel']
    gone = 'kombu.transport.nothing:Channel'
    assert lacking([parts.Part('x', gone, ('a', 'b'))]) == [f'{gone}.a', f'{gone}.b']


def test_without_a_part_for_receiving_it_is_kombus_way_and_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delattr(transport.Channel, '_brpop_start')
    with caplog.at_level(logging.WARNING):
        assert not parts.check_parts('redis', True)
    assert [record.levelname for record in caplog.records] == ['WARNING']
    assert 'kombu.transport.redis:Channel._brpop_start' in caplog.text
    caplog.clear()
    assert not parts.check_parts('amqp', True) and not caplog.records


def test_an_operator_can_have_kombus_way(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert parts.check_parts('redis', True)
    assert not parts.check_parts('redis', False) and not caplog.records
    app = Celery('parts', broker='redis://127.0.0.1:1/0', set_as_current=False)
    monkeypatch.setenv('JOBSYNC_REDIS_ATOMIC', 'no')
    assert not read_settings(app, {'database_url': _URL}).redis_atomic


def test_without_a_part_for_the_gate_the_worker_does_not_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        parts,
        'PARTS',
        (parts.Part(parts.GATE, 'celery.worker.consumer.consumer:Consumer', ('on_nothing',)),),
    )
    with pytest.raises(ConfigurationError, match=r'Consumer\.on_nothing'):
        parts.check_parts('redis', True)
