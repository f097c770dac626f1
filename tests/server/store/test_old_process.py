"""A process of an earlier version runs beside one of this version: while the tables are brought
forward under it, it goes on, and neither does what the other has done.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobsync_core import CoordinationConfig, DuplicateExecution, Job
from jobsync_core.store.layout import SCHEMA_VERSION
from tests.support.cluster import query
from tests.support.waiting import eventually

ROOT = Path(__file__).parents[3]
#: Versions of processes that know of no queue groups.
BEFORE_GROUPS = [3, 9]
#: The last commits of schema versions that processes may run with.
COMMITS = {3: '304afc4', 9: '3d2fb40', 10: '437a725'}
PROGRAM = """
import json, sys
from jobsync_core import CoordinationConfig, DuplicateExecution, Job
from jobsync_core.store.schema import MIGRATIONS
assert len(MIGRATIONS) == int(sys.argv[1])
with Job('old', CoordinationConfig(**json.loads(sys.stdin.readline())), wait_on_enter=0) as job:
    print('entered', flush=True)
    for line in sys.stdin:
        command, _, key = line.strip().partition(' ')
        if command == 'leave':
            break
        if command == 'tokens':
            print(len(job.my_tokens), flush=True)
            continue
        try:
            with job.once(key):
                answer = 'ran'
        except DuplicateExecution:
            answer = 'refused'
        print(answer, flush=True)
print('left', flush=True)
"""


class OldProcess:
    """A node of an earlier version.

    Args:
        code: Where its code is.
        config: The cluster.
        version: Of its tables.
    """

    def __init__(self, code: Path, config: CoordinationConfig, version: int) -> None:
        self.version = version
        self._process = subprocess.Popen(
            [sys.executable, '-c', PROGRAM, str(version)],
            cwd=code,
            env={**os.environ, 'PYTHONPATH': str(code)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        names = ('host', 'port', 'dbname', 'user', 'password')
        times = ('heartbeat_interval_sec', 'heartbeat_timeout_sec', 'rebalance_check_interval_sec')
        settings = {name: getattr(config, name) for name in (*names, *times)}
        assert self.ask(json.dumps(settings)) == 'entered'

    def ask(self, command: str) -> str:
        """Send a line; the line that it answers."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(command + '\n')
        self._process.stdin.flush()
        return self._process.stdout.readline().strip()

    @property
    def tokens(self) -> int:
        return int(self.ask('tokens'))

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture(params=COMMITS)
def old(
    request: pytest.FixtureRequest, tmp_path: Path, config: CoordinationConfig
) -> Iterator[OldProcess]:
    git = shutil.which('git')
    done = git and subprocess.run(
        [git, 'archive', '--format=zip', COMMITS[request.param], 'jobsync_core'],
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    if not done or done.returncode:
        pytest.skip('the history of the repository is not here')
    with zipfile.ZipFile(io.BytesIO(done.stdout)) as archive:
        archive.extractall(tmp_path)
    process = OldProcess(tmp_path, config, request.param)
    yield process
    process.kill()


def version(config: CoordinationConfig) -> int:
    return int(query(config, 'SELECT schema_version FROM "{}cluster"')[0][0])


def test_it_shares_the_tokens_and_the_ledger_with_a_node_of_this_version(
    old: OldProcess, config: CoordinationConfig
) -> None:
    eventually(lambda: old.tokens == config.total_tokens)
    assert (version(config), old.ask('once first')) == (old.version, 'ran')
    with Job('new', config, wait_on_enter=0) as job:
        assert version(config) == SCHEMA_VERSION
        eventually(lambda: len(job.my_tokens) + old.tokens == config.total_tokens and old.tokens)
        assert len(job.my_tokens) > 0
        with pytest.raises(DuplicateExecution), job.once('first'):
            pass
        with job.once('second'):
            assert old.ask('once third') == 'ran'
        assert old.ask('once second') == 'refused'
        assert old.ask('leave') == 'left'
        eventually(lambda: len(job.my_tokens) == config.total_tokens)


def test_its_tokens_and_keys_go_over_when_it_is_killed(
    old: OldProcess, config: CoordinationConfig
) -> None:
    eventually(lambda: old.tokens == config.total_tokens)
    with Job('new', config, wait_on_enter=0) as job:
        eventually(lambda: len(job.my_tokens) + old.tokens == config.total_tokens and old.tokens)
        old.kill()
        eventually(lambda: len(job.my_tokens) == config.total_tokens)
        assert job.am_i_leader()


def owns_all(job: Job, group: str) -> bool:
    return all(job.owns(f'task-{number}', group) for number in range(100))


@pytest.mark.parametrize('old', BEFORE_GROUPS, indirect=True)
def test_it_makes_room_for_a_leader_that_plans_queue_groups(
    old: OldProcess, config: CoordinationConfig
) -> None:
    eventually(lambda: old.tokens == config.total_tokens)
    with Job('new', config, wait_on_enter=0, groups=['mail']) as job:
        eventually(lambda: owns_all(job, 'mail') and job.am_i_leader())
        eventually(lambda: len(job.my_tokens) + old.tokens == config.total_tokens and old.tokens)


@pytest.mark.parametrize('old', BEFORE_GROUPS, indirect=True)
def test_where_it_leads_nobody_loses_what_it_does_not_know(
    old: OldProcess, config: CoordinationConfig
) -> None:
    eventually(lambda: old.tokens == config.total_tokens)
    with Job('new', config, wait_on_enter=0, groups=['mail']) as job:
        eventually(lambda: owns_all(job, 'mail'))
        query(
            config,
            """UPDATE "{}node" SET created_on = now() - interval '1 hour' WHERE name = 'old'""",
        )
        eventually(lambda: not job.am_i_leader())
        mine = next(f'task-{number}' for number in range(100) if job.owns(f'task-{number}'))
        job.register_lock(mine, 'old')  # takes a plan
        eventually(lambda: job.explain(mine)['owner'] == 'old')
        assert not job.am_i_leader()
        assert owns_all(job, 'mail')
        assert query(config, 'SELECT DISTINCT node FROM ONLY "{}ring"') == [('new',)]
        job.clear_all_locks()
        job.enroll(['mail', 'fast'])
        assert old.ask('leave') == 'left'
        eventually(lambda: owns_all(job, 'mail') and owns_all(job, 'fast'))
