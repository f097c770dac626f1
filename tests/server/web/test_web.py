"""Health and metrics as probes and Prometheus fetch them: over real HTTP."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from jobsync_core import ConfigurationError, CoordinationConfig, Job
from jobsync_core.web import health as web
from jobsync_core.web.health import HealthServer, node_metrics, split_address
from tests.support.waiting import eventually

ROOT = Path(__file__).parents[3]
READY = {'lease': True, 'consuming': True, 'node': 'n1'}


@dataclass
class Answer:
    code: int
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def ask(
    server: HealthServer,
    path: str,
    method: str = 'GET',
    body: bytes | None = None,
    host: str = '127.0.0.1',
) -> Answer:
    connection = HTTPConnection(host, server.port, timeout=10)
    try:
        connection.request(method, path, body)
        answer = connection.getresponse()
        return Answer(answer.status, answer.read(), dict(answer.headers))
    finally:
        connection.close()


def exchange(server: HealthServer, request: bytes) -> bytes:
    """All that comes back until the server ends the connection; a reset is an error."""
    with socket.create_connection(('127.0.0.1', server.port), 10) as client:
        client.sendall(request)
        return b''.join(iter(lambda: client.recv(4096), b''))


def listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(5)
        return probe.connect_ex(('127.0.0.1', port)) == 0


@pytest.fixture
def serve() -> Iterator[Callable[..., HealthServer]]:
    """Starts servers that end with the test."""
    started: list[HealthServer] = []

    def start(
        ready: Callable[[], Mapping[str, object]] = lambda: READY,
        metrics: Callable[[], bytes] | None = lambda: b'# none\n',
        address: str | int = '127.0.0.1:0',
        backlog: Callable[[str | None], Mapping[str, object]] | None = None,
    ) -> HealthServer:
        started.append(HealthServer(address, ready=ready, metrics=metrics, backlog=backlog))
        return started[-1]

    yield start
    for server in started:
        server.close()


class TestBacklog:
    def test_one_queue_or_all(self, serve: Callable[..., HealthServer]) -> None:
        server = serve(backlog=lambda queue: {'asked': queue})
        assert ask(server, '/backlog').json == {'asked': None}
        assert ask(server, '/backlog?queue=high%20prio').json == {'asked': 'high prio'}

    @pytest.mark.parametrize('query', ['queue=', 'queue=a&queue=b', 'name=a', 'queue=a&x=1'])
    def test_another_question_is_refused(
        self, serve: Callable[..., HealthServer], query: str
    ) -> None:
        server = serve(backlog=lambda queue: {'asked': queue})
        assert ask(server, f'/backlog?{query}').code == 400

    def test_a_broker_that_is_away_is_no_empty_queue(
        self, serve: Callable[..., HealthServer], caplog: pytest.LogCaptureFixture
    ) -> None:
        def away(queue: str | None) -> Mapping[str, object]:
            raise ConnectionError('amqp://user:password@host is away')

        answer = ask(serve(backlog=away), '/backlog?queue=a')
        assert answer.code == 503
        assert 'ConnectionError' in answer.json['error'] and b'password' not in answer.body

    def test_a_server_without_a_broker_has_none(self, serve: Callable[..., HealthServer]) -> None:
        assert ask(serve(), '/backlog').code == 404


class TestAddress:
    @pytest.mark.parametrize(
        ('address', 'found'),
        [
            (':8080', ('', 8080)),
            (8080, ('', 8080)),
            ('8080', ('', 8080)),
            (0, ('', 0)),
            ('127.0.0.1:8080', ('127.0.0.1', 8080)),
            ('[::1]:8080', ('::1', 8080)),
            ('[fe80::1%eth0]:1', ('fe80::1%eth0', 1)),
            ('my-host.example:65535', ('my-host.example', 65535)),
        ],
    )
    def test_each_form_is_understood(self, address: object, found: tuple[str, int]) -> None:
        assert split_address(address) == found

    @pytest.mark.parametrize(
        'address',
        [
            '',
            ':',
            'here',
            'here:',
            ':http',
            '::1:8080',
            '[::1]',
            '[::1:8080',
            '[:8080',
            '[]:8080',
            ':65536',
            -1,
            70000,
            ':-1',
            'http://a:80',
            ':80/x',
            'a b:80',
            ':8080\n',
            ':٣',
            True,
            None,
            8080.0,
        ],
    )
    def test_what_is_none_is_refused_by_name_and_with_the_remedy(self, address: Any) -> None:
        with pytest.raises(ConfigurationError) as caught:
            HealthServer(address, ready=lambda: READY, metrics=None)
        assert repr(address) in str(caught.value)
        assert "':8080'" in str(caught.value)

    def test_a_port_in_use_is_named(self, serve: Callable[..., HealthServer]) -> None:
        taken = f'127.0.0.1:{serve().port}'
        with pytest.raises(ConfigurationError, match=r'in use.*choose .* a free port') as caught:
            serve(address=taken)
        assert taken in str(caught.value)

    @pytest.mark.parametrize('address', ['192.0.2.1:0', 'a..b:0', f'{"x" * 70}:0'])
    def test_a_host_that_is_not_this_machine_is_named(
        self, serve: Callable[..., HealthServer], address: str
    ) -> None:
        with pytest.raises(ConfigurationError) as caught:
            serve(address=address)
        assert address in str(caught.value)
        assert 'choose an address of this machine' in str(caught.value)

    def test_ipv6_is_served(self, serve: Callable[..., HealthServer]) -> None:
        with contextlib.closing(socket.socket(socket.AF_INET6)) as probe:
            try:
                probe.bind(('::1', 0))
            except OSError:
                pytest.skip('this machine has no IPv6')
        assert ask(serve(address='[::1]:0'), '/health/live', host='::1').code == 200

    def test_every_address_of_the_machine_is_served_without_a_host(
        self, serve: Callable[..., HealthServer]
    ) -> None:
        assert ask(serve(address=':0'), '/health/live').code == 200


class TestAnswers:
    def test_live_whatever_the_node_does(self, serve: Callable[..., HealthServer]) -> None:
        answer = ask(
            serve(lambda: {'lease': False, 'consuming': False, 'node': 'n1'}), '/health/live'
        )
        assert (answer.code, answer.json) == (200, {'status': 'live'})
        assert answer.headers['Content-Type'] == 'application/json'

    @pytest.mark.parametrize(
        ('lease', 'consuming', 'code', 'status'),
        [
            (True, True, 200, 'ready'),
            (False, True, 200, 'ready'),
            (True, False, 503, 'not_ready'),
            (False, False, 503, 'not_ready'),
        ],
    )
    def test_ready_is_a_worker_that_consumes_with_a_lease_or_uncoordinated(
        self,
        serve: Callable[..., HealthServer],
        lease: bool,
        consuming: bool,
        code: int,
        status: str,
    ) -> None:
        found = {'lease': lease, 'consuming': consuming, 'node': 'n1'}
        answer = ask(serve(lambda: found), '/health/ready')
        assert (answer.code, answer.json) == (code, {'status': status, **found})

    def test_what_the_node_does_not_say_is_not_ready(
        self, serve: Callable[..., HealthServer]
    ) -> None:
        assert ask(serve(dict), '/health/ready').code == 503

    def test_metrics_are_text_of_prometheus(self, serve: Callable[..., HealthServer]) -> None:
        answer = ask(serve(metrics=lambda: b'a 1\n'), '/metrics')
        assert (answer.code, answer.body) == (200, b'a 1\n')
        assert answer.headers['Content-Type'].startswith('text/plain; version=0.0.4')

    def test_without_the_extra_metrics_name_it(self, serve: Callable[..., HealthServer]) -> None:
        answer = ask(serve(metrics=None), '/metrics')
        assert answer.code == 501
        assert 'jobsync-workers[metrics]' in answer.json['error']

    @pytest.mark.parametrize(
        'path', ['/health/live', '/health/live/', '/health/live?verbose=1', '/metrics/']
    )
    def test_a_slash_and_a_query_do_not_matter(
        self, serve: Callable[..., HealthServer], path: str
    ) -> None:
        assert ask(serve(), path).code == 200

    @pytest.mark.parametrize(
        'path', ['/', '/health', '/health/live/x', '/etc/passwd', '/health/../metrics']
    )
    def test_other_paths_are_not_found(self, serve: Callable[..., HealthServer], path: str) -> None:
        assert ask(serve(), path).code == 404

    @pytest.mark.parametrize(
        ('path', 'code'),
        [('/health/live', 200), ('/health/ready', 503), ('/metrics', 200), ('/x', 404)],
    )
    def test_head_answers_like_get_without_a_body(
        self, serve: Callable[..., HealthServer], path: str, code: int
    ) -> None:
        server = serve(lambda: {'lease': False})
        head, get = ask(server, path, 'HEAD'), ask(server, path)
        assert head.code == get.code == code
        assert head.headers['Content-Length'] == get.headers['Content-Length'] == str(len(get.body))
        assert exchange(server, f'HEAD {path} HTTP/1.1\r\n\r\n'.encode()).endswith(b'\r\n\r\n')

    @pytest.mark.parametrize(
        'method', ['POST', 'PUT', 'DELETE', 'PATCH', 'OPTIONS', 'TRACE', 'BREW']
    )
    def test_other_methods_are_refused(
        self, serve: Callable[..., HealthServer], method: str
    ) -> None:
        answer = ask(serve(), '/health/live', method)
        assert answer.code == 405
        assert answer.headers['Allow'] == 'GET, HEAD'

    def test_what_cannot_be_told_is_an_error_of_the_server_and_logged(
        self, serve: Callable[..., HealthServer], caplog: pytest.LogCaptureFixture
    ) -> None:
        def broken() -> Any:
            raise ConnectionError('postgresql://u:s3cret@h')

        server = serve(broken, broken)
        for path in ('/health/ready', '/metrics'):
            answer = ask(server, path)
            assert answer.code == 500
            assert b's3cret' not in answer.body
        assert [record.getMessage() for record in caplog.records] == [
            '/health/ready cannot be answered',
            '/metrics cannot be answered',
        ]
        assert ask(server, '/health/live').code == 200

    def test_a_probe_leaves_no_log(
        self,
        serve: Callable[..., HealthServer],
        caplog: pytest.LogCaptureFixture,
        capfd: pytest.CaptureFixture[str],
    ) -> None:
        caplog.set_level(logging.DEBUG)
        server = serve()
        for path, method in (('/health/live', 'GET'), ('/x', 'GET'), ('/metrics', 'POST')):
            ask(server, path, method)
        assert (caplog.records, capfd.readouterr()) == ([], ('', ''))


class TestNode:
    def test_a_node_is_ready_with_its_lease_and_counts_its_messages(
        self, config: CoordinationConfig, serve: Callable[..., HealthServer]
    ) -> None:
        counts = {'received': 5, 'forwarded': 2}
        with Job('n1', config, wait_on_enter=0) as job:
            server = serve(
                lambda: {
                    'lease': job.am_i_healthy(),
                    'consuming': job.am_i_healthy(),
                    'node': job.node_name,
                },
                node_metrics(job, lambda: counts),
            )
            assert ask(server, '/health/ready').json == {
                'status': 'ready',
                'lease': True,
                'consuming': True,
                'node': 'n1',
            }
            counts['received'] += 1
            samples = {
                (sample.name, sample.labels.get('event')): sample.value
                for family in text_string_to_metric_families(ask(server, '/metrics').body.decode())
                for sample in family.samples
                if sample.labels.get('node') == 'n1'
            }
            assert samples[('jobsync_messages_total', 'received')] == 6
            assert samples[('jobsync_messages_total', 'forwarded')] == 2
            assert samples[('jobsync_healthy', None)] == 1
        assert ask(server, '/health/ready').code == 503

    def test_without_prometheus_client_there_are_no_metrics_and_all_else_works(
        self, tmp_path: Path
    ) -> None:
        (tmp_path / 'prometheus_client.py').write_text(
            "raise ModuleNotFoundError(name='prometheus_client')\n"
        )
        program = (
            'from urllib.request import urlopen\n'
            'from jobsync_core import Job\n'
            'from jobsync_core.web.health import HealthServer, node_metrics\n'
            'with Job("n") as job:\n'
            '    server = HealthServer("127.0.0.1:0", ready=dict, metrics=node_metrics(job, '
            'dict))\n'
            '    print(node_metrics(job, dict), '
            'urlopen(f"http://127.0.0.1:{server.port}/health/live").status)\n'
            '    server.close()\n'
        )
        done = subprocess.run(
            [sys.executable, '-W', 'error', '-c', program],
            cwd=ROOT,
            env={**os.environ, 'PYTHONPATH': f'{tmp_path}:{ROOT}'},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
            check=False,
        )
        assert (done.returncode, done.stdout) == (0, 'None 200\n')


class TestClients:
    def test_clients_that_are_silent_or_vanish_hinder_nobody(
        self, serve: Callable[..., HealthServer]
    ) -> None:
        server = serve()
        with contextlib.ExitStack() as stack:
            for _ in range(20):
                stack.enter_context(socket.create_connection(('127.0.0.1', server.port), 5))
            for sent in (
                b'',
                b'GET /health',
                b'\x16\x03\x01nonsense\r\n\r\n',
                b'GET /metrics HTTP/1.1\r\n\r\n',
            ):
                with socket.create_connection(('127.0.0.1', server.port), 5) as gone:
                    gone.sendall(sent)
            assert ask(server, '/health/ready').code == 200

    def test_a_client_that_never_ends_its_request_is_ended(
        self, serve: Callable[..., HealthServer], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(web, '_PATIENCE', 0.5)
        server = serve()
        with socket.create_connection(('127.0.0.1', server.port), 5) as slow:
            slow.settimeout(0.05)

            def ended() -> bool:
                # A byte now and then: each one alone comes soon enough.
                try:
                    slow.sendall(b'x')
                    return slow.recv(1) == b''
                except TimeoutError:
                    return False
                except ConnectionError:
                    return True

            eventually(ended)
        eventually(lambda: not workers())
        assert ask(server, '/health/live').code == 200

    def test_crowds_of_slow_clients_do_not_keep_probes_out_nor_eat_threads(
        self, serve: Callable[..., HealthServer], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(web, '_MOST', 8)
        monkeypatch.setattr(web, '_PATIENCE', 600.0)
        server = serve()
        with contextlib.ExitStack() as stack:
            for _ in range(40):
                stack.enter_context(socket.create_connection(('127.0.0.1', server.port), 5))
            assert ask(server, '/health/live').code == 200
            eventually(lambda: len(workers()) <= 8)

    def test_many_probes_at_once(self, serve: Callable[..., HealthServer]) -> None:
        server = serve()
        codes: list[int] = []
        threads = [
            threading.Thread(target=lambda: codes.append(ask(server, '/health/ready').code))
            for _ in range(30)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert codes == [200] * 30


def workers() -> list[threading.Thread]:
    """Threads that serve one connection each."""
    return [thread for thread in threading.enumerate() if 'process_request_thread' in thread.name]


class TestEnd:
    def test_close_ends_it_with_its_connections_and_its_port_is_free(
        self, serve: Callable[..., HealthServer]
    ) -> None:
        server = serve()
        with socket.create_connection(('127.0.0.1', server.port), 5) as waiting:
            eventually(workers)
            server.close()
            assert waiting.recv(1) == b''
        assert not listens(server.port)
        assert 'jobsync-http' not in {thread.name for thread in threading.enumerate()}
        assert ask(serve(address=f'127.0.0.1:{server.port}'), '/health/live').code == 200
        server.close()

    def test_nothing_keeps_the_process(self) -> None:
        program = (
            'from jobsync_core.web.health import HealthServer\n'
            'server = HealthServer("127.0.0.1:0", ready=dict, metrics=None)\n'
        )
        done = subprocess.run(
            [sys.executable, '-W', 'error', '-c', program],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=30,
            check=False,
        )
        assert (done.returncode, done.stdout) == (0, '')


@pytest.mark.filterwarnings('ignore:This process .* is multi-threaded:DeprecationWarning')
class TestFork:
    def test_a_child_that_outlives_a_killed_process_does_not_keep_its_port(self) -> None:
        program = (
            'import os, sys, time\n'
            'from jobsync_core.web.health import HealthServer\n'
            'server = HealthServer("127.0.0.1:0", ready=dict, metrics=None)\n'
            'if not os.fork():\n'
            '    print(server.port, flush=True)\n'
            '    sys.stdin.read()\n'
            '    print("ended", flush=True)\n'
            '    os._exit(0)\n'
            'time.sleep(60)\n'
        )
        with subprocess.Popen(
            [sys.executable, '-c', program],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                port = int(process.stdout.readline())
                assert listens(port)
                process.kill()
                process.wait()
                assert not listens(port)
            finally:
                process.kill()
                process.stdin.close()
            assert process.stdout.read() == 'ended\n'

    def test_a_child_cannot_end_the_server(self, serve: Callable[..., HealthServer]) -> None:
        server = serve()
        child = os.fork()
        if not child:
            try:
                server.close()
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        assert ask(server, '/health/live').code == 200

    def test_a_request_that_is_under_way_ends_with_its_answer(
        self, serve: Callable[..., HealthServer]
    ) -> None:
        asked, go = threading.Event(), threading.Event()

        def slow() -> bytes:
            asked.set()
            go.wait(20)
            return b'done\n'

        server = serve(metrics=slow)
        with socket.create_connection(('127.0.0.1', server.port), 20) as client:
            client.sendall(b'GET /metrics HTTP/1.0\r\n\r\n')
            assert asked.wait(20)
            closed, close = os.pipe()
            child = os.fork()
            if not child:
                try:
                    os.close(close)
                    os.read(closed, 1)
                finally:
                    os._exit(0)
            try:
                go.set()
                answer = b''.join(iter(lambda: client.recv(4096), b''))
                assert answer.endswith(b'\r\n\r\ndone\n')
            finally:
                os.close(close)
                os.close(closed)
                os.waitpid(child, 0)
