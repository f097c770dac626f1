"""The blocks of the Dramatiq chapter run as printed, and its tables tell the truth."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import closing
from dataclasses import MISSING, fields
from inspect import signature
from pathlib import Path

import pytest

from jobsync_core import CoordinationConfig
from jobsync_core.worker.settings import PluginSettings
from jobsync_dramatiq import exactly_once
from tests.support.brokers import BrokerServer
from tests.support.cluster import query
from tests.support.waiting import eventually

from ..docs.blocks import ROOT, Block, blocks_of
from ..docs.project import Project

DOCUMENT = ROOT / 'docs' / 'DRAMATIQ.md'
#: It would install into the environment of the tests.
NOT_RUN = "pip install 'jobsync-workers[cli,dramatiq]' 'dramatiq[redis]'\n"
CHARGES = 'CREATE TABLE charges (order_id int, amount int)'


def is_rabbit(block: Block) -> bool:
    """Whether a block belongs to the project on RabbitMQ."""
    return (
        block.text.startswith('# rabbit.py')
        or 'from rabbit import' in block.text
        or 'dramatiq rabbit' in block.text
    )


def run(project: Project, blocks: list[Block], after: dict[str, Callable[[], object]]) -> None:
    """Run blocks; what follows the block that contains a text. Each must be found."""
    for block in blocks:
        project.run(block)
        for text in [text for text in after if text in block.text]:
            after.pop(text)()
    assert not after, 'the document has no such block any more'


def nodes(config: CoordinationConfig, number: int, appname: str = 'sync_') -> None:
    """Wait until so many nodes share all tokens."""
    rows = (
        'SELECT count(DISTINCT node), count(*) FILTER (WHERE moving OR node IS NULL) FROM '
        f'{appname}assignment'
    )
    eventually(lambda: query(config, rows) == [(number, 0)], 30)


@pytest.mark.timeout(240)
def test_the_guide(config: CoordinationConfig, redis_server: BrokerServer, tmp_path: Path) -> None:
    query(config, CHARGES)
    with closing(Project(DOCUMENT, config, redis_server, tmp_path)) as project:
        environment = project.programs.environment
        environment['REDIS_URL'] = environment['CELERY_BROKER_URL']

        def printed(*texts: str) -> Callable[[], None]:
            def look() -> None:
                assert [text for text in texts if text not in project.printed[-1]] == [], (
                    project.printed[-1]
                )

            return look

        def charges() -> None:
            assert project.printed[-1].endswith('-250\n-250\n40\n40\n')
            assert sorted(query(config, 'SELECT * FROM charges')) == [(17, -250), (18, 40)]

        def sums() -> None:
            assert project.printed[-1].endswith('[3, 3, 7]\n113\n')
            eventually(
                lambda: query(config, 'SELECT count(*) FROM charges WHERE order_id = 0') == [(1,)],
                20,
            )

        blocks = [
            block for block in blocks_of(DOCUMENT) if block.text != NOT_RUN and not is_rabbit(block)
        ]
        run(
            project,
            blocks,
            after={
                'dramatiq proj -p 2': lambda: nodes(config, 3),
                'import charge\n': printed('250 250\n'),
                'import render': printed('\ngpu-primary@'),
                'import refund, transfer': charges,
                'import add, report': sums,
                'import fetch': printed('feed of 2024-05-01\n'),
                'jobsync undrain': printed(
                    'gpu-primary@', 'order:17', 'gives its tokens away now', 'takes part again'
                ),
                '/health/ready': printed('"lease": true', 'jobsync_messages_total'),
            },
        )
        assert query(
            config, "SELECT attempts FROM sync_execution WHERE key LIKE '%%feed:2024-05-01'"
        ) == [(2,)]


def test_the_part_on_rabbitmq(
    config: CoordinationConfig, rabbitmq_server: BrokerServer, tmp_path: Path
) -> None:
    query(config, CHARGES)
    with closing(Project(DOCUMENT, config, rabbitmq_server, tmp_path)) as project:
        environment = project.programs.environment
        environment['RABBITMQ_URL'] = environment['CELERY_BROKER_URL']
        blocks = [block for block in blocks_of(DOCUMENT) if is_rabbit(block)]
        assert len(blocks) == 3
        run(project, blocks, after={'dramatiq rabbit': lambda: nodes(config, 2, 'rabbit_')})
        eventually(
            lambda: query(config, 'SELECT count(DISTINCT order_id) FROM charges') == [(20,)], 30
        )
        eventually(
            lambda: not rabbitmq_server.depths(project.programs.space), 30
        )  # the repetitions are done as well
        assert query(config, 'SELECT count(*) FROM charges') == [(20,)]


def test_every_setting_and_option_has_its_true_default() -> None:
    found = re.findall(
        r'^\| `(\w+)` \| (.+?) \|', DOCUMENT.read_text(encoding='utf-8'), re.MULTILINE
    )
    # `affinity` is both; the table of the settings comes first.
    settings, rows = dict(reversed(found)), dict(found)
    for field in fields(PluginSettings):
        default = '{}' if field.default is MISSING else repr(field.default)
        assert settings[field.name] == (
            'made from the rest' if field.name == 'config' else f'`{default}`'
        )
    for name, option in signature(exactly_once).parameters.items():
        if isinstance(option.default, (bool, str)):
            assert rows[name] == f'`{option.default!r}`'
        else:
            assert name in rows or name == 'bare'
