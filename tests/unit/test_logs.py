"""What a log line tells stays on its line."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest

from jobsync_celery.logs import get_logger as celery_logger
from jobsync_core.logs import get_logger, one_line

ROOT = Path(__file__).parents[2]
FORGED = 'key\n2026-01-01 ERROR node=n1 all is lost\r\x1b[2J\x85\u2028\ud800'
#: Ways of logging that pass by the escapes.
_ELSEWHERE = re.compile(
    r'getLogger\(|celery\.utils\.log|logging\.(?:debug|info|warning|error|exception|log)\('
)


class Unprintable(Exception):
    """An error that fails when it is shown."""

    def __str__(self) -> str:
        raise RuntimeError('not now')


@pytest.mark.parametrize('make', [get_logger, celery_logger])
def test_names_and_errors_begin_no_line_of_their_own(
    make: object, caplog: pytest.LogCaptureFixture
) -> None:
    assert callable(make)
    logger = make('jobsync_test.lines')
    assert make('jobsync_test.lines') is logger and len(logger.filters) == 1
    caplog.set_level(logging.INFO)
    logger.info('key=%s number=%d share=%.1f', FORGED, 3, 0.5)
    logger.warning('node=%(node)s', {'node': FORGED})
    logger.error('failed: %s, that is %r', ValueError(FORGED), ValueError(FORGED))
    logger.error('failed: %s', Unprintable())
    messages = [
        record.getMessage() for record in caplog.records if record.name == 'jobsync_test.lines'
    ]
    assert len(messages) == 4 and all(message.isprintable() for message in messages), messages
    assert messages[0].endswith('number=3 share=0.5') and messages[0].startswith('key=key\\n2026')
    assert messages[3] == 'failed: <Unprintable that cannot be shown: RuntimeError>'


def test_text_without_control_characters_stays_as_it_is() -> None:
    assert one_line('käse 100 % 日本') == 'käse 100 % 日本'
    assert one_line('a\nb\tc') == 'a\\nb\\tc'


def test_every_module_logs_through_such_a_logger() -> None:
    for package in ('jobsync_core', 'jobsync_celery', 'jobsync_dramatiq'):
        for path in (ROOT / package).rglob('*.py'):
            if path.name != 'logs.py':
                found = _ELSEWHERE.findall(path.read_text())
                assert not found, f'{path.relative_to(ROOT)}: use get_logger of logs.py'
