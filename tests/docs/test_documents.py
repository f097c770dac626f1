"""Every block of the documents runs as printed, and so does every snippet of the specification."""

from __future__ import annotations

import logging
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import MISSING, fields
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psycopg2
import pytest

from jobsync_celery import exactly_once
from jobsync_celery.settings import CelerySettings
from jobsync_core import CoordinationConfig, Job, Task
from jobsync_core.embedded.postgres import EmbeddedPostgres
from jobsync_core.store.schema import create_schema
from tests.support.brokers import BrokerServer
from tests.support.cluster import query
from tests.support.waiting import eventually

from .blocks import ROOT, Block, blocks_of
from .project import Project
from .stage import Stage, connected, entered

#: The guides' blocks start a good thirty processes one after the other.
pytestmark = pytest.mark.timeout(300)

SPECIFICATION = Path(__file__).with_name('usage_guide_spec.md')
DOCUMENTS = [
    ROOT / 'README.md',
    ROOT / 'CHANGELOG.md',
    ROOT / 'CONTRIBUTING.md',
    *sorted((ROOT / 'docs').glob('*.md')),
    SPECIFICATION,
]

#: Blocks that are not run, and why.
NOT_RUN = {
    'make demo\nmake test\n': 'they would run this test; the build runs both',
    'make test\n': 'it would run this test',
    "pip install 'jobsync-workers[cli]'\n": 'it would install into the environment of the tests',
    "pip install 'jobsync-workers[celery,cli]' 'celery[redis]'\n": 'likewise',
}


@pytest.fixture
def stage(
    make_config: Callable[..., CoordinationConfig],
    postgres: EmbeddedPostgres,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Stage]:
    # A signal handler that a block installs goes with the test.
    before = signal.getsignal(signal.SIGTERM)
    yield Stage(make_config(), postgres, tmp_path, monkeypatch)
    signal.signal(signal.SIGTERM, before)


def make_tables(stage: Stage) -> None:
    create_schema(stage.config)
    with connected(stage.config) as connection, connection.cursor() as cursor:
        cursor.execute('CREATE TABLE charges (order_id int, amount int)')


def charges(stage: Stage) -> Counter[int]:
    with connected(stage.config) as connection, connection.cursor() as cursor:
        cursor.execute('SELECT order_id FROM charges')
        return Counter(row[0] for row in cursor.fetchall())


class Until:
    """The end of a document's endless loop: true once the condition is, and an error after so many
    rounds.
    """

    def __init__(self, condition: Callable[[], bool], rounds: int) -> None:
        self._condition = condition
        self._left = rounds

    def __bool__(self) -> bool:
        assert self._left > 0, 'what the loop waits for did not happen'
        self._left -= 1
        return self._condition()


def run_blocks(
    stage: Stage | Project,
    path: Path,
    before: dict[str, Callable[[], object]] | None = None,
    after: dict[str, Callable[[], object]] | None = None,
) -> list[Block]:
    """Run a document; a hook runs before or after the block that contains its text. Each hook must
    find its block.
    """
    hooks = [(dict(before or {}), True), (dict(after or {}), False)]
    blocks = [block for block in blocks_of(path) if block.text not in NOT_RUN]
    for block in blocks:
        for found, first in hooks:
            if not first:
                stage.run(block)
            for text in [text for text in found if text in block.text]:
                found.pop(text)()
    assert not [text for found, _ in hooks for text in found], (
        f'{path.name} has no such block any more'
    )
    return blocks


def test_readme(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    make_tables(stage)

    def shipped_all() -> None:
        lines = capsys.readouterr().out.splitlines()
        assert sorted(lines) == sorted(f'shipping {order_id}' for order_id in range(100))

    run_blocks(
        stage,
        ROOT / 'README.md',
        after={'def ship(': shipped_all, 'def charge(': lambda: same(charges(stage), {17: 1})},
    )


def check(condition: bool) -> None:
    assert condition


def same(actual: object, expected: object) -> None:
    assert actual == expected


def test_usage_guide(stage: Stage) -> None:
    make_tables(stage)
    processed: Counter[object] = Counter()
    opened, closed, made = [], [], []

    def subscribe(symbol: str) -> object:
        opened.append(symbol)
        return SimpleNamespace(close=lambda: closed.append(symbol))

    def make_invoice(order_id: int) -> int:
        made.append(order_id)
        return 100 + order_id

    stage.names.update(
        open_tasks=lambda: range(50),
        process=lambda task_id: processed.update([task_id]),
        all_symbols=lambda: {'AAA', 'BBB'},
        subscribe=subscribe,
        stopping=Until(lambda: len(opened) == 2, 200).__bool__,
        wait=lambda: time.sleep(0.05),
        make_invoice=make_invoice,
        an_order=SimpleNamespace(id=7),
        database_connection=lambda: psycopg2.connect(
            host=stage.config.host,
            port=stage.config.port,
            dbname=stage.config.dbname,
            user='postgres',
            password=stage.config.password,
        ),
    )
    run_blocks(
        stage,
        ROOT / 'docs' / 'USAGE_GUIDE.md',
        after={
            'wait_on_enter=10) as job': lambda: same(processed, dict.fromkeys(range(50), 1)),
            'get_audit()': lambda: same(
                set(stage.names['done']), {str(number) for number in range(50)}
            ),
            'def follow(': lambda: check(sorted(opened) == ['AAA', 'BBB'] == sorted(closed)),
            'def invoice(': lambda: same(made, [7]),
            'execution.complete(cursor)': lambda: same(charges(stage), {1: 1, 2: 1}),
            'job.undrain()': lambda: same(stage.names['job'].node_name, 'worker-01'),
            'signal.SIGTERM': lambda: check(
                signal.getsignal(signal.SIGTERM) not in (signal.SIG_DFL, signal.SIG_IGN)
            ),
        },
    )


def test_operator_guide(stage: Stage) -> None:
    nodes = ExitStack()

    def enter_nodes() -> None:
        running.enter_context(entered(stage.config, 'worker-01', 'worker-02'))

    def least_rights_are_enough() -> None:
        settings = {name: getattr(stage.config, name) for name in ('host', 'port', 'dbname')}
        with connected(stage.config) as connection, connection.cursor() as cursor:
            cursor.execute("ALTER ROLE jobsync_worker PASSWORD 'change-me'")
        config = CoordinationConfig(**settings, user='jobsync_worker', password='change-me')
        with entered(config, 'worker-least') as (job,):
            assert job.am_i_healthy()
            assert job.can_claim_task('order-17')
            job.add_task('order-17')
            job.write_audit()
            job.register_lock('render-1', 'worker-%', 'test')
            with job.once('key') as execution:
                execution.result = 1
            job.clear_all_locks()
            assert job.get_audit() == [{'node': 'worker-least', 'task_id': 'order-17'}]

    def drop_roles() -> None:
        with connected(stage.config) as connection, connection.cursor() as cursor:
            cursor.execute(
                'DROP OWNED BY jobsync_worker, jobsync_reader; DROP ROLE jobsync_worker, '
                'jobsync_reader'
            )

    def nothing_is_left() -> None:
        with connected(stage.config) as connection, connection.cursor() as cursor:
            cursor.execute("""
                SELECT relname::text FROM pg_class WHERE relname LIKE 'sync!_%' ESCAPE '!'
                UNION ALL SELECT proname::text FROM pg_proc WHERE proname LIKE 'sync!_%' ESCAPE
                    '!'""")
            same(cursor.fetchall(), [])

    nodes.callback(drop_roles)
    with nodes, ExitStack() as running:
        run_blocks(
            stage,
            ROOT / 'docs' / 'OPERATOR_GUIDE.md',
            before={'jobsync status\n': enter_nodes, 'DROP VIEW': running.close},
            after={
                'DROP VIEW': nothing_is_left,
                'jobsync init-db --role jobsync_worker\n': least_rights_are_enough,
                'jobsync who order-17': lambda: check(
                    'worker-0' in stage.printed[-1] and 'render-1' in stage.printed[-1]
                ),
                'jobsync undrain worker-01': lambda: check('takes part again' in stage.printed[-1]),
            },
        )


def test_celery_guide(stage: Stage, redis_server: BrokerServer, tmp_path: Path) -> None:
    make_tables(stage)
    path = ROOT / 'docs' / 'CELERY.md'
    with closing(Project(path, stage.config, redis_server, tmp_path)) as project:

        def all_share() -> None:
            rows = (
                'SELECT count(DISTINCT node), count(*) FILTER (WHERE moving OR node IS NULL) '
                'FROM {}assignment'
            )
            eventually(lambda: query(stage.config, rows) == [(2, 0)], 20)

        def printed(*texts: str) -> Callable[[], None]:
            return lambda: same([text for text in texts if text not in project.printed[-1]], [])

        def drained() -> None:
            same(
                [
                    text
                    for text in (
                        'one@',
                        'gpu-primary-01@',
                        "'consuming': True",
                        '2 nodes online',
                        'takes part again',
                    )
                    if text not in project.printed[-1]
                ],
                [],
            )

        run_blocks(
            project,
            path,
            before={'import render': all_share},
            after={
                'import charge\n': printed('250 250'),
                'import render': printed('gpu-primary-01@'),
                'import refund, transfer': lambda: same(
                    (project.printed[-1][-16:], charges(stage)),
                    ('-250\n-250\n40\n40\n', {17: 1, 18: 1}),
                ),
                'inspect jobsync': printed(
                    'one@', 'gpu-primary-01@', 'consuming', '2 nodes online', 'takes part again'
                ),
                '/health/ready': printed('"lease": true', 'jobsync_messages_total'),
                'beat -S jobsync': lambda: eventually(
                    lambda: (
                        query(stage.config, 'SELECT name FROM {}schedule') == [('every-minute',)]
                    ),
                    20,
                ),
            },
        )
        run_blocks(
            project,
            ROOT / 'docs' / 'QUEUES.md',
            after={'jobsync purge': printed('"known": true', 'messages of celery deleted')},
        )
        # Taking it out: the project of this guide, once its workers have ended.
        project.programs.end()
        run_blocks(
            project,
            ROOT / 'docs' / 'IN_AND_OUT.md',
            after={'evacuate': printed('0 messages moved home')},
        )


def test_the_celery_guide_gives_every_setting_and_option_with_its_true_default() -> None:
    found = re.findall(
        r'^\| `(\w+)` \| (.+?) \|',
        (ROOT / 'docs' / 'CELERY.md').read_text(encoding='utf-8'),
        re.MULTILINE,
    )
    # `affinity` is both; the table of the settings comes first.
    settings, rows = dict(reversed(found)), dict(found)
    for field in fields(CelerySettings):
        default = '{}' if field.default is MISSING else repr(field.default)
        assert settings[field.name] == (
            'made from the rest' if field.name == 'config' else f'`{default}`'
        )
    for name, option in signature(exactly_once).parameters.items():
        if isinstance(option.default, (bool, str)):
            assert rows[name] == f'`{option.default!r}`'
        else:
            assert name in rows or name == 'bare'


@pytest.mark.parametrize('name', ['GUARANTEES.md', 'ARCHITECTURE.md', 'INTERNALS.md'])
def test_other_documents(stage: Stage, name: str) -> None:
    make_tables(stage)
    run_blocks(stage, ROOT / 'docs' / name)


def test_the_snippets_of_the_specification(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    make_tables(stage)
    processed: Counter[object] = Counter()
    claims: list[object] = []

    def process_tasks(job: Any) -> None:
        claims.extend(number for number in range(20) if job.can_claim_task(Task(number)))

    def locks() -> dict[str, list[str]]:
        with connected(stage.config) as connection, connection.cursor() as cursor:
            cursor.execute(
                f'SELECT task_id, node_patterns FROM {stage.names["coord_config"].appname}lock'
            )
            return dict(cursor.fetchall())

    def first_block_ran_its_share() -> None:
        # Two other nodes have joined for minimum_nodes=3 and own the rest.
        assert 0 < len(processed) < 600
        assert set(processed.values()) == {1}
        with connected(stage.config) as connection, connection.cursor() as cursor:
            cursor.execute('SELECT task_id, node FROM myapp_audit')
            assert dict(cursor.fetchall()) == {str(task_id): 'worker-01' for task_id in processed}
        processed.clear()

    def fallback_patterns_are_registered() -> None:
        config = stage.names['coord_config']
        with entered(config, 'gpu-primary-01', 'us-west-1-a') as (gpu, west):
            stage.names['register_locks_with_fallback'](gpu)
            assert locks()['100'] == ['gpu-primary-01', '%-gpu']
            assert gpu.explain(100)['pattern'] == 'gpu-primary-01'
            assert west.explain(200)['pattern'] == 'us-%'
            gpu.clear_all_locks()

    def health_follows_the_lease() -> None:
        assert stage.names['health']() == ({'status': 'not_ready'}, 503)
        with entered(stage.config, 'worker-health') as (job,):
            stage.names['job'] = job
            assert stage.names['health']() == ({'status': 'ready'}, 200)

    joined: list[Job] = []

    def another_node_has_joined() -> bool:
        if not joined:
            joined.append(nodes.enter_context(entered(stage.names['coord_config'], 'worker-02'))[0])
        # Half of the tokens, less those that the locks of the snippets before block.
        return re.search(r'now own (499\d|5000) tokens', caplog.text) is not None

    stage.names.update(
        get_pending_tasks=lambda: range(600),
        get_all_tasks=lambda: range(30),
        process_task=lambda task_id: processed.update([task_id]),
        get_gpu_task_ids=lambda: [1000, 1001],
        get_todays_heavy_tasks=lambda: [7, 8],
        process_tasks=process_tasks,
        logger=logging.getLogger('document'),
        time=time,
        shutdown=Until(another_node_has_joined, 20),
        app=SimpleNamespace(route=lambda path: lambda function: function),
    )
    with ExitStack() as nodes, caplog.at_level(logging.INFO, 'document'):
        blocks = run_blocks(
            stage,
            SPECIFICATION,
            after={
                'minimum_nodes=3': first_block_ran_its_share,
                'coordination_config=None': lambda: same(len(processed), 30),
                'register_gpu_locks': lambda: same(locks(), {'1000': ['%-gpu'], '1001': ['%-gpu']}),
                'register_locks_with_fallback': fallback_patterns_are_registered,
                'clear_existing_locks=True': lambda: same(
                    (locks(), claims),
                    (
                        {'7': ['high-mem-%'], '8': ['high-mem-%']},
                        [number for number in range(20) if number not in (7, 8)],
                    ),
                ),
                'clear_existing_locks=False': lambda: check(
                    locks()['customer-X'] == ['east-%'] and '7' in locks()
                ),
                'def on_rebalance():': nodes.close,
                'def health():': health_follows_the_lease,
            },
        )
    assert len(blocks) == 14


def test_every_document_is_tested_and_every_block_has_a_known_language() -> None:
    tested = {
        'README.md',
        'USAGE_GUIDE.md',
        'OPERATOR_GUIDE.md',
        'CELERY.md',
        'GUARANTEES.md',
        'ARCHITECTURE.md',
        'INTERNALS.md',
        SPECIFICATION.name,
        'IN_AND_OUT.md',
        'QUEUES.md',
        'DRAMATIQ.md',
        'TESTING.md',
    }  # in tests/dramatiq and tests/testing
    blocks = [block for path in DOCUMENTS for block in blocks_of(path)]
    for block in blocks:
        assert block.language in ('python', 'sql', 'sh', 'ini'), block
        assert block.path.name in tested or block.text in NOT_RUN, block
    for path in DOCUMENTS:
        assert path.read_text(encoding='utf-8').count('\n```') == 2 * len(blocks_of(path)), path
    assert not [text for text in NOT_RUN if text not in {block.text for block in blocks}], (
        'an entry of NOT_RUN is stale'
    )


def test_nothing_of_a_document_is_left_running(stage: Stage) -> None:
    before = set(threading.enumerate())
    make_tables(stage)
    stage.run(blocks_of(SPECIFICATION)[0])
    stage.names.update(get_pending_tasks=lambda: range(3), process_task=print)
    stage.run(blocks_of(SPECIFICATION)[1])
    # The thread that watches over blocking calls goes with the last deadline, one heartbeat timeout
    # after the last call.
    eventually(lambda: set(threading.enumerate()) <= before, timeout=30)
