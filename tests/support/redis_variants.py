"""Redis as it is run in production: with TLS, in cluster mode, and with a replica behind Sentinel.

Each gives itself the URL by which clients reach it, so that a test needs no more than the server.
"""

from __future__ import annotations

import contextlib
import secrets
import shutil
import subprocess
from functools import cached_property
from typing import Any
from urllib.parse import urlencode

from .brokers import BrokerUnavailable, RedisServer, free_port
from .waiting import eventually

__all__ = ['ClusterRedis', 'SentinelRedis', 'TlsRedis']

_HOST = '127.0.0.1'
_PASSWORD = 'pass:'


class TlsRedis(RedisServer):
    """Speaks TLS only, and only with clients that have a certificate of its authority.

    Attributes:
        secret: The password of the client's key.

    Raises:
        BrokerUnavailable: There is no redis-server with TLS, or no openssl.
    """

    def __init__(self) -> None:
        super().__init__()
        self.secret = secrets.token_hex(8)
        openssl = shutil.which('openssl')
        if openssl is None:
            raise BrokerUnavailable('no openssl on PATH, which makes certificates')
        self._openssl = openssl
        self._make('authority', '-x509', '-nodes', '-subj', '/CN=authority')
        signed = ('-x509', '-CA', 'authority.crt', '-CAkey', 'authority.key')
        here = ('-subj', f'/CN={_HOST}', '-addext', f'subjectAltName=IP:{_HOST}')
        self._make('server', *signed, *here, '-nodes')
        self._make('client', *signed, '-subj', '/CN=client', '-passout', _PASSWORD + self.secret)

    def _make(self, name: str, *options: str) -> None:
        files = ('-keyout', f'{name}.key', '-out', f'{name}.crt', '-days', '2')
        done = subprocess.run(
            [self._openssl, 'req', '-newkey', 'rsa:2048', *files, *options],
            cwd=self.home,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise BrokerUnavailable(f'openssl makes no certificates: {done.stderr}')

    @cached_property
    def options(self) -> dict[str, str]:
        """What redis-py needs."""
        return {
            'ssl_ca_certs': str(self.home / 'authority.crt'),
            'ssl_certfile': str(self.home / 'client.crt'),
            'ssl_keyfile': str(self.home / 'client.key'),
            'ssl_password': self.secret,
            'ssl_cert_reqs': 'required',
        }

    def url(self, space: str, port: int | None = None) -> str:
        return f'rediss://{_HOST}:{port or self.port}/{space}?{urlencode(self.options)}'

    def client(self, space: str = '0') -> Any:
        from redis import Redis

        return Redis.from_url(self.url(space), decode_responses=True, socket_timeout=5)

    def _options(self) -> dict[str, object]:
        return {
            **super()._options(),
            'port': 0,
            'tls-port': self.port,
            'tls-cert-file': 'server.crt',
            'tls-key-file': 'server.key',
            'tls-ca-cert-file': 'authority.crt',
            'tls-auth-clients': 'yes',
        }

    def start(self) -> None:
        try:
            super().start()
        except RuntimeError as error:
            if 'Bad directive' in str(error) or 'tls' in str(error).lower():
                raise BrokerUnavailable(f'this redis-server has no TLS: {error}') from error
            raise


class ClusterRedis(RedisServer):
    """A cluster of one, which has all slots: it refuses whatever is not in one slot, as every
    cluster does.
    """

    def new_space(self) -> str:
        return '0'  # a cluster has no other

    def _options(self) -> dict[str, object]:
        options = {
            **super()._options(),
            'cluster-enabled': 'yes',
            'cluster-port': free_port(),
            'cluster-announce-ip': _HOST,
        }
        del options['databases']
        return options

    def _answers(self) -> bool:
        if not super()._answers():
            return False
        with contextlib.closing(self.client()) as client:
            state = str(client.execute_command('CLUSTER', 'INFO'))
            if 'cluster_slots_assigned:0' in state:
                client.execute_command('CLUSTER', 'ADDSLOTS', *range(16_384))
            return 'cluster_state:ok' in state


class SentinelRedis(RedisServer):
    """A master named 'shop', a replica, and a Sentinel, which is enough to decide.

    Attributes:
        secret, sentinels_secret: The password of the servers, and that of the Sentinel.
    """

    master_name = 'shop'

    def __init__(self) -> None:
        super().__init__()
        self.secret, self.sentinels_secret = secrets.token_hex(8), secrets.token_hex(8)
        self._replica = _Secret(self.secret)
        self._sentinel = _Sentinel(self.sentinels_secret, self.port, self.secret)

    def url(self, space: str, port: int | None = None) -> str:
        return f'sentinel://:{self.secret}@{_HOST}:{port or self._sentinel.port}/{space}'

    @property
    def master(self) -> int:
        """The port of the master, by what the Sentinel says."""
        with contextlib.closing(self._sentinel.client()) as client:
            return int(client.execute_command('SENTINEL', 'GET-MASTER-ADDR-BY-NAME', 'shop')[1])

    def client(self, space: str = '0') -> Any:
        """A client of the master."""
        return self._client(self.master if self._sentinel.is_running() else self.port, space)

    def _client(self, port: int, space: str = '0') -> Any:
        return _client(port, self.secret, space)

    def fail_over(self) -> None:
        """Make the replica the master, once it has all that the master has; the other one becomes
        its replica.
        """
        before = self.master
        self.wait_in_step()
        with contextlib.closing(self._sentinel.client()) as client:
            client.execute_command('SENTINEL', 'FAILOVER', self.master_name)
        eventually(lambda: self.master != before, 30)

    def kill_master(self) -> None:
        """End the master with SIGKILL, once the replica has all that it has; the Sentinel makes the
        replica the master.
        """
        before = self.master
        assert before == self.port
        self.wait_in_step()
        self.kill()
        eventually(lambda: self.master != before, 30)

    def wait_in_step(self) -> None:
        """Wait until the replica has all that the master has: what only the master had when it was
        lost is no matter of the workers'.
        """

        def in_step() -> bool:
            with contextlib.closing(self.client()) as client:
                return bool(client.execute_command('WAIT', 1, 1000))

        eventually(in_step, 20)

    def start(self) -> None:
        super().start()
        self._replica.start()
        with contextlib.closing(self._client(self._replica.port)) as client:
            client.execute_command('REPLICAOF', _HOST, self.port)
            eventually(lambda: client.info('replication')['master_link_status'] == 'up', 20)
        self._sentinel.start()

    def close(self) -> None:
        self._sentinel.close()
        self._replica.close()
        super().close()

    def _options(self) -> dict[str, object]:
        return {**super()._options(), **_secured(self.secret)}

    def _answers(self) -> bool:
        with contextlib.closing(self._client(self.port)) as client:
            return _answers(client)


class _Secret(RedisServer):
    """A server with a password."""

    def __init__(self, secret: str) -> None:
        super().__init__()
        self._secret = secret

    def client(self, space: str = '0') -> Any:
        return _client(self.port, self._secret, space)

    def _options(self) -> dict[str, object]:
        return {**super()._options(), **_secured(self._secret)}


class _Sentinel(RedisServer):
    def __init__(self, secret: str, master: int, masters_secret: str) -> None:
        super().__init__()
        self._secret = secret
        (self.home / 'sentinel.conf').write_text(
            f'port {self.port}\nbind {_HOST}\nrequirepass {secret}\n'
            f'sentinel monitor shop {_HOST} {master} 1\n'
            f'sentinel auth-pass shop {masters_secret}\n'
            'sentinel down-after-milliseconds shop 1000\nsentinel failover-timeout shop 5000\n'
        )

    def client(self, space: str = '0') -> Any:
        return _client(self.port, self._secret, '0')

    def _launch(self) -> None:
        self._process = self._spawn([self.program, 'sentinel.conf', '--sentinel'])

    def _answers(self) -> bool:
        with contextlib.closing(self.client()) as client:
            return _answers(client) and bool(client.execute_command('SENTINEL', 'REPLICAS', 'shop'))


def _secured(secret: str) -> dict[str, object]:
    return {'requirepass': secret, 'masterauth': secret, 'repl-diskless-sync-delay': 0}


def _client(port: int, secret: str, space: str) -> Any:
    from redis import Redis

    return Redis(
        host=_HOST,
        port=port,
        password=secret,
        db=int(space),
        decode_responses=True,
        socket_timeout=5,
    )


def _answers(client: Any) -> bool:
    from redis.exceptions import RedisError

    try:
        return bool(client.ping())
    except RedisError:
        return False
