"""What a connection asks of libpq and of the server, and what went wrong, in words."""

from __future__ import annotations

import difflib
import math
import re
import socket
import threading
import time
from dataclasses import dataclass, fields
from typing import Any

import psycopg2
from psycopg2.extensions import parse_dsn

from ..config import CoordinationConfig
from ..environment import ADAPTER_VARIABLES
from ..errors import ConfigurationError, DatabaseUnavailable, StoreTimeout
from .location import PINNED_PATH

__all__ = [
    'Keepalive',
    'Limits',
    'agent_limits',
    'call_limits',
    'check_options',
    'explain',
    'keepalive',
    'libpq_parameters',
    'resolve',
    'text_of',
]

_PREFIX = 'jobsync '
_APPLICATION_NAME_BYTES = 63
_NAME = re.compile(r'[a-z_]+')
#: Parameters of libpq that are offered in the place of one that is misspelt; which there are, libpq
#: itself knows.
_PARAMETERS = (
    'application_name',
    'channel_binding',
    'client_encoding',
    'connect_timeout',
    'fallback_application_name',
    'gssencmode',
    'gsslib',
    'hostaddr',
    'keepalives',
    'keepalives_count',
    'keepalives_idle',
    'keepalives_interval',
    'krbsrvname',
    'load_balance_hosts',
    'options',
    'passfile',
    'replication',
    'require_auth',
    'requirepeer',
    'service',
    'ssl_max_protocol_version',
    'ssl_min_protocol_version',
    'sslcert',
    'sslcertmode',
    'sslcompression',
    'sslcrl',
    'sslcrldir',
    'sslkey',
    'sslmode',
    'sslnegotiation',
    'sslpassword',
    'sslrootcert',
    'sslsni',
    'target_session_attrs',
    'tcp_user_timeout',
)


def libpq_parameters(config: CoordinationConfig, name: str) -> dict[str, Any]:
    """What every connection asks of libpq; connection_options win."""
    timeout = config.heartbeat_timeout_sec
    shown = name if name.startswith(_PREFIX) else _PREFIX + name
    parameters: dict[str, Any] = {
        'application_name': shown.encode()[:_APPLICATION_NAME_BYTES].decode(errors='ignore'),
        'keepalives': 1,
        'keepalives_idle': max(1, math.ceil(timeout / 3)),
        'keepalives_interval': max(1, math.ceil(timeout / 6)),
        'keepalives_count': 3,
        # to try it takes a round trip and a megabyte; who uses it says so in connection_options
        'gssencmode': 'disable',
        'tcp_user_timeout': max(1000, math.ceil(timeout * 1000)),
    }
    if len(config.hosts) > 1:
        parameters['target_session_attrs'] = 'read-write'
    parameters.update(config.connection_options)
    parameters.update(dbname=config.dbname, user=config.user)
    if config.password is not None:
        parameters['password'] = config.password
    return parameters


def check_options(config: CoordinationConfig) -> None:
    """Refuse a parameter that libpq does not know, before anything is opened. Its value is not
    told.

    Raises:
        ConfigurationError: There is one; the message names it and the remedy.
    """
    for name in config.connection_options:
        if not _is_parameter(name):
            raise ConfigurationError(_no_parameter(name))


def _is_parameter(name: str) -> bool:
    if not _NAME.fullmatch(name):
        return False
    try:
        parse_dsn(f"{name}=''")
    except psycopg2.ProgrammingError:
        return False
    return True


def _no_parameter(name: str) -> str:
    known = {item.name for item in fields(CoordinationConfig)} - {
        'connection_options'
    } | ADAPTER_VARIABLES
    near = difflib.get_close_matches(name, [*sorted(known), *_PARAMETERS], 1)
    meant = near[0] if near else ''
    text = f'{name[:60]!r} in the database URL or in connection_options is no parameter of libpq'
    if meant in known:
        return (
            f'{text}; {meant} is a setting of JobSync: give it as a keyword, {meant}=…, or as the '
            'environment variable '
            f'JOBSYNC_{meant.upper()}'
        )
    return text + (
        f': did you mean {meant!r}?'
        if meant
        else ": remove it; libpq's are in PostgreSQL's documentation, such as sslmode"
    )


@dataclass(frozen=True)
class Limits:
    """What the server is asked to end by itself, in seconds."""

    statement: float
    lock: float
    idle: float

    def settings(self, version: int = 0) -> dict[str, str]:
        """What each transaction of JobSync's own needs, whatever the defaults of server, database
        and role are.

        Args:
            version: The server's, as psycopg2 gives it (170002); 0: the oldest that is supported.
        """
        found = {
            'search_path': PINNED_PATH,
            # Rows that a policy would hide are an error, not missing nodes.
            'row_security': 'off',
            # Weights come back as they were written, and a list of nothing but NULLs, which
            # psycopg2 writes as text, goes there.
            'extra_float_digits': '1',
            'array_nulls': 'on',
            'lock_timeout': f'{math.ceil(self.lock * 1000)}ms',
            'idle_in_transaction_session_timeout': f'{math.ceil(self.idle * 1000)}ms',
            'synchronous_commit': 'on',
        }
        if version >= 170_000:
            found['transaction_timeout'] = '0'
        return found

    def begin_session(self, version: int, keepalive: Keepalive | None) -> str:
        """Statements that set them for a session, of which the first must come before a short
        statement_timeout of the role strikes.
        """
        settings = {
            **self.settings(version),
            'default_transaction_isolation': 'read committed',
            'default_transaction_read_only': 'off',
            'default_transaction_deferrable': 'off',
            'idle_session_timeout': '0',
            **(keepalive.settings() if keepalive is not None else {}),
        }
        return f"SET statement_timeout TO '{self._statement}'; {_set(settings, local=False)}"

    def begin_transaction(self, version: int, writing: bool = True) -> str:
        """Statements that set them for a transaction, at its very beginning, wherever a pooler may
        run that.

        Args:
            version: As for `settings`.
            writing: False for a transaction that a standby may run.
        """
        settings = _set(self.settings(version), local=True)
        return (
            f"SET LOCAL statement_timeout TO '{self._statement}'; {_characteristics(writing)}; "
            f'{settings}'
        )

    def begin_users(self, version: int, session: bool) -> str:
        """Statements that begin a transaction of the user's on such a connection: the search_path
        and the rest are the role's own.

        Args:
            version: As for `settings`.
            session: Whether `begin_session` has set them for the session.
        """
        if not session:
            return _characteristics(writing=True)
        return '; '.join(
            f'SET LOCAL {name} TO DEFAULT'
            for name in (
                'search_path',
                'row_security',
                'extra_float_digits',
                'array_nulls',
                *(['transaction_timeout'] if version >= 170_000 else []),
            )
        )

    @staticmethod
    def begin_exclusive(keepalive: Keepalive) -> str:
        """Statements that begin a transaction of the user's on a connection that has no settings of
        its own.
        """
        return f'{_characteristics(writing=True)}; {_set(keepalive.settings(), local=True)}'

    @property
    def answer(self) -> float:
        """Seconds within which the answer to a statement comes: the server's own refusal arrives
        first, and the connection can stay.
        """
        return self.statement + max(0.25, self.statement / 4)

    @property
    def _statement(self) -> str:
        return f'{math.ceil(self.statement * 1000)}ms'


@dataclass(frozen=True)
class Keepalive:
    """When the server takes a client for gone that no longer answers, in seconds. On Unix sockets
    the server knows at once.

    Args:
        after: Of silence.
        user_timeout: For which sent data may stay unacknowledged.
        checks: Whether the server looks for a closed connection while it runs a statement; not
            every system can.
    """

    after: float
    user_timeout: float
    checks: bool = True

    def settings(self) -> dict[str, str]:
        """Settings of a session."""
        found = {
            'tcp_keepalives_idle': str(max(1, math.ceil(self.after / 3))),
            'tcp_keepalives_interval': str(max(1, math.ceil(self.after / 6))),
            'tcp_keepalives_count': '3',
            'tcp_user_timeout': f'{math.ceil(self.user_timeout * 1000)}ms',
        }
        if self.checks:
            found['client_connection_check_interval'] = (
                f'{max(1000, math.ceil(self.after * 1000 / 3))}ms'
            )
        return found


def keepalive(config: CoordinationConfig) -> Keepalive:
    """What every session asks of the server: its client is gone after about one heartbeat timeout
    of silence.
    """
    return Keepalive(config.heartbeat_timeout_sec, max(1.0, config.heartbeat_timeout_sec))


def _characteristics(writing: bool) -> str:
    return 'SET TRANSACTION ISOLATION LEVEL READ COMMITTED' + (', READ WRITE' if writing else '')


def _set(settings: dict[str, str], local: bool) -> str:
    # One statement for all. By its full name: it is what pins the path.
    return 'SELECT ' + ', '.join(
        f"pg_catalog.set_config('{name}', '{value}', {str(local).lower()})"
        for name, value in settings.items()
    )


def agent_limits(config: CoordinationConfig) -> Limits:
    """For the agent: a heartbeat must never have to wait for long behind another request."""
    statement = max(0.5, min(config.heartbeat_interval_sec, config.heartbeat_timeout_sec / 5))
    return Limits(
        statement, statement * 0.8, max(statement, min(1.0, config.heartbeat_timeout_sec))
    )


def call_limits(config: CoordinationConfig) -> Limits:
    """For calls of the API: more time for a statement, but a stopped process keeps no lock for
    longer.
    """
    statement = max(5.0, config.heartbeat_timeout_sec)
    return Limits(statement, statement * 0.9, max(1.0, agent_limits(config).idle))


def resolve(host: str, port: int, deadline: float) -> list[str | None]:
    """Addresses of a host. Looking them up cannot be interrupted, so that it is left to a thread
    that may outlast the wait.
    """
    if host.startswith(('/', '@')):
        return [None]
    found: list[str | None] = []
    problems: list[OSError | UnicodeError] = []

    def look_up() -> None:
        try:
            entries = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            found.extend(dict.fromkeys(str(entry[4][0]) for entry in entries))
        except (OSError, UnicodeError) as error:
            problems.append(error)

    thread = threading.Thread(target=look_up, name='jobsync-lookup', daemon=True)
    thread.start()
    thread.join(max(0.0, deadline - time.monotonic()))
    if problems:
        raise DatabaseUnavailable(f'the host name cannot be resolved: {problems[0]}') from problems[
            0
        ]
    if not found:
        raise StoreTimeout('the host name was not resolved in time')
    return found


def explain(config: CoordinationConfig, where: str, error: Exception) -> str:
    text = text_of(error)
    if config.unset:
        # libpq's own text may end in a question mark.
        text += f' ({config.unset} is not set, so that the default place was tried)'
    # Before a connection is there, libpq tells no SQLSTATE.
    if f'database "{config.dbname}" does not exist' in text:
        return (
            f'PostgreSQL at {where} has no database {config.dbname!r}: create it with `createdb '
            f'{config.dbname}`'
            + (f', or set {config.unset}, which is not set' if config.unset else '')
        )
    return (
        f'cannot connect to PostgreSQL at {where}, database {config.dbname!r}, user '
        f'{config.user!r}: {text}'
    )


def text_of(error: Exception) -> str:
    return ' '.join(str(error).split()) or type(error).__name__
