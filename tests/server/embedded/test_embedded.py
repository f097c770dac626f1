"""The embedded server: crash, pause, recovery, and nothing left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, urlsplit

import psycopg2
import pytest
from redis import Redis
from redis.exceptions import AuthenticationError

from jobsync_core.embedded import EmbeddedPostgres, EmbeddedRedis, EmbeddedServerError
from jobsync_core.embedded.supervisor import running, server_processes
from tests.conftest import SETTINGS
from tests.support.waiting import eventually

_OWNER = """
import sys, time
from jobsync_core.embedded.postgres import EmbeddedPostgres
server = EmbeddedPostgres(settings={'fsync': 'off'})
server.start()
print(server.pid, server.log.parent, flush=True)
sys.stdin.readline()
"""


_REDIS_OWNER = """
import sys
from jobsync_core.embedded import EmbeddedRedis
with EmbeddedRedis() as server:
    print(server.pid, flush=True)
    sys.stdin.readline()
"""


def read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError:
        return b''


def parent(pid: int) -> int:
    return int(read(f'/proc/{pid}/stat').rpartition(b')')[2].split()[1] or 0)


@contextlib.contextmanager
def connected(server: EmbeddedPostgres) -> Iterator[psycopg2.extensions.connection]:
    with contextlib.closing(psycopg2.connect(server.url(), connect_timeout=5)) as connection:
        connection.autocommit = True
        yield connection


def ask(server: EmbeddedPostgres, statement: str) -> object:
    with connected(server) as connection, connection.cursor() as cursor:
        cursor.execute(statement)
        row = cursor.fetchone() if cursor.description else None
        return row[0] if row else None


def processes(server: EmbeddedPostgres) -> list[int]:
    pid = ask(server, "SELECT split_part(pg_read_file('postmaster.pid'), E'\\n', 1)")
    return server_processes(int(str(pid)))


def test_committed_rows_survive_a_kill(own_server: EmbeddedPostgres) -> None:
    port = own_server.port
    ask(own_server, 'CREATE TABLE kept AS SELECT 7 AS value')
    pids = processes(own_server)
    own_server.kill()
    assert not own_server.is_running()
    assert not [pid for pid in pids if running(pid)]
    own_server.start()
    assert own_server.port == port
    assert ask(own_server, 'SELECT value FROM kept') == 7


def test_a_kill_ends_paused_backends_too(own_server: EmbeddedPostgres) -> None:
    with connected(own_server) as connection:
        own_server.pause()
        own_server.kill()
        own_server.start()
        with pytest.raises(psycopg2.OperationalError), connection.cursor() as cursor:
            cursor.execute('SELECT 1')
    assert ask(own_server, 'SELECT 1') == 1


def test_a_paused_server_answers_nobody_and_keeps_its_connections(
    own_server: EmbeddedPostgres,
) -> None:
    with connected(own_server) as connection:
        own_server.pause()
        with pytest.raises(psycopg2.OperationalError, match='timeout'):
            psycopg2.connect(own_server.url(), connect_timeout=2)
        own_server.resume()
        with connection.cursor() as cursor:
            cursor.execute('SELECT 1')
            assert cursor.fetchone() == (1,)


def test_stop_removes_a_temporary_directory_and_keeps_a_given_one(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    with EmbeddedPostgres(settings=SETTINGS) as server:
        temporary = server.log.parent
        assert temporary.is_dir()
        given = temporary.parent / f'{temporary.name}-given'
    assert not temporary.exists()
    kept = EmbeddedPostgres(data_dir=given, settings=SETTINGS)
    try:
        with kept:
            ask(kept, 'CREATE TABLE kept ()')
        with EmbeddedPostgres(data_dir=given, settings=SETTINGS) as again:
            assert ask(again, 'SELECT count(*) FROM kept') == 0
    finally:
        subprocess.run(['rm', '-rf', str(given)], check=True)


def test_a_second_server_on_the_same_data_is_refused(own_server: EmbeddedPostgres) -> None:
    with pytest.raises(EmbeddedServerError, match='already exists'):
        EmbeddedPostgres(data_dir=own_server.log.parent, bin_dir=own_server.bin_dir).start()
    assert ask(own_server, 'SELECT 1') == 1


def test_a_failed_start_says_what_the_log_says() -> None:
    server = EmbeddedPostgres(settings={'shared_buffers': 'many'})
    with pytest.raises(EmbeddedServerError, match='invalid value for parameter "shared_buffers"'):
        server.start()
    server.stop()
    assert not server.is_running()


def test_binaries_that_are_not_there_are_an_error_at_once(tmp_path: Path) -> None:
    with pytest.raises(EmbeddedServerError, match='cannot be run'):
        EmbeddedPostgres(bin_dir=tmp_path)


def test_a_database_name_needs_no_care(postgres: EmbeddedPostgres) -> None:
    name = 'a"b/c d%?'
    postgres.create_database(name)
    with contextlib.closing(psycopg2.connect(postgres.url(name))) as connection:
        assert connection.info.dbname == name
        postgres.drop_database(name)


@pytest.mark.skipif(os.geteuid() != 0, reason='only root has to run the server as somebody else')
def test_under_root_the_server_runs_as_an_unprivileged_user(postgres: EmbeddedPostgres) -> None:
    owners = set()
    for pid in processes(postgres):
        with contextlib.suppress(FileNotFoundError):  # that of a connection that ends
            owners.add(Path('/proc', str(pid)).stat().st_uid)
    assert owners and 0 not in owners


def test_the_password_is_random_and_the_only_way_in(postgres: EmbeddedPostgres) -> None:
    config = postgres.config()
    assert (
        config.password
        and len(config.password) > 20
        and quote(config.password, safe='') in postgres.url()
    )
    for guess in ('postgres', '', 'x'):
        with pytest.raises(psycopg2.OperationalError, match='password'):
            psycopg2.connect(
                host=config.host,
                port=config.port,
                user='postgres',
                dbname='postgres',
                password=guess,
            )
    file = postgres.log.parent / 'password'
    assert file.stat().st_mode & 0o077 == 0 and file.read_text() == config.password
    with EmbeddedPostgres(settings=SETTINGS) as other:
        assert other.config().password != config.password


def test_data_of_a_server_with_the_former_password_get_a_new_one(
    own_server: EmbeddedPostgres,
) -> None:
    ask(own_server, "ALTER ROLE postgres PASSWORD 'postgres'")
    own_server.kill()
    (own_server.log.parent / 'password').unlink()
    own_server.start()
    password = own_server.config().password
    assert password not in (None, 'postgres') and ask(own_server, 'SELECT 1') == 1
    own_server.restart()
    assert own_server.config().password == password and ask(own_server, 'SELECT 1') == 1


def test_no_process_of_a_server_shows_anything_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('SOME_API_KEY', 's3cret-of-the-environment')
    with EmbeddedPostgres(settings=SETTINGS) as server, EmbeddedRedis() as redis:
        secrets = [
            b's3cret-of-the-environment',
            str(server.config().password).encode(),
            redis.url().split('@')[0][-20:].encode(),
        ]
        supervisors = [
            int(entry)
            for entry in os.listdir('/proc')
            if entry.isdecimal()
            and b'embedded/supervisor.py' in read(f'/proc/{entry}/cmdline')
            and parent(int(entry)) == os.getpid()
        ]
        assert len(supervisors) >= 2
        ids = processes(server)
        arguments = {pid: read(f'/proc/{pid}/cmdline') for pid in [*supervisors, *ids, redis.pid]}
        assert all(arguments[pid] for pid in [*supervisors, ids[0], redis.pid])
        # The server's process for the question of a moment ago, or for a vacuum, may be ending:
        # then it shows nothing.
        eventually(
            lambda: not [pid for pid, shown in arguments.items() if not shown and running(pid)]
        )
        assert not [
            pid for pid, shown in arguments.items() for secret in secrets if secret in shown
        ]
        for pid in [*processes(server), redis.pid]:
            assert not [secret for secret in secrets if secret in read(f'/proc/{pid}/environ')]


def test_a_link_in_place_of_the_log_is_followed_neither_for_writing_nor_for_reading(
    tmp_path: Path,
) -> None:
    target = tmp_path / 'somebody-elses'
    target.write_text('s3cret\n')
    with EmbeddedPostgres(settings=SETTINGS) as server:
        server.kill()
        server.log.unlink()
        server.log.symlink_to(target)
        with pytest.raises(EmbeddedServerError) as caught:
            server.start()
        assert 's3cret' not in str(caught.value) and target.read_text() == 's3cret\n'


@pytest.mark.skipif(
    not sys.platform.startswith('linux'),
    reason='only Linux tells a process that its parent is gone',
)
def test_a_server_whose_supervisor_is_killed_ends_before_its_data_are_removed() -> None:
    server = EmbeddedPostgres(settings=SETTINGS)
    server.start()
    pids, home = processes(server), server.log.parent
    os.kill(parent(pids[0]), signal.SIGKILL)
    eventually(lambda: not [pid for pid in pids if running(pid)])
    server.stop()
    assert not home.exists()


def test_a_redis_server_takes_its_password_alone() -> None:
    with EmbeddedRedis() as server:
        with contextlib.closing(Redis.from_url(server.url())) as client:
            assert client.ping()
        address = urlsplit(server.url())
        with contextlib.closing(Redis(host='127.0.0.1', port=int(address.port or 0))) as stranger:
            with pytest.raises(AuthenticationError):
                stranger.ping()
        pid = server.pid
    assert not running(pid)


@pytest.mark.parametrize('number', [signal.SIGKILL, signal.SIGTERM])
def test_no_redis_server_outlives_its_owner(number: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, '-c', _REDIS_OWNER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as owner:
        assert owner.stdout is not None
        pid = int(owner.stdout.readline())
        owner.send_signal(number)
    eventually(lambda: not running(pid))


@pytest.mark.parametrize('number', [signal.SIGKILL, signal.SIGTERM])
def test_no_server_outlives_its_owner(number: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, '-c', _OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None
        pid, home = owner.stdout.readline().split()
        pids = server_processes(int(pid))
        assert len(pids) > 1
        owner.send_signal(number)
    eventually(lambda: not [pid for pid in pids if running(pid)])
    eventually(lambda: not Path(home).exists())
