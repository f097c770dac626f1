"""What a connection asks of libpq and of the server, and what went wrong, in words."""
from __future__ import annotations

import math
import socket
import threading
import time
from dataclasses import dataclass
from typing import Any

from ..config import CoordinationConfig
from ..errors import DatabaseUnavailable, StoreTimeout

__all__ = ['Limits', 'agent_limits', 'call_limits', 'explain', 'libpq_parameters', 'resolve', 'text_of']

_PREFIX = 'jobsync '
_APPLICATION_NAME_BYTES = 63


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
        'gssencmode': 'disable',  # to try it takes a round trip and a megabyte; who uses it says so in connection_options
        'tcp_user_timeout': max(1000, math.ceil(timeout * 1000)),
    }
    if len(config.hosts) > 1:
        parameters['target_session_attrs'] = 'read-write'
    parameters.update(config.connection_options)
    parameters.update(dbname=config.dbname, user=config.user)
    if config.password is not None:
        parameters['password'] = config.password
    return parameters


@dataclass(frozen=True)
class Limits:
    """What the server is asked to end by itself, in seconds."""

    statement: float
    lock: float
    idle: float

    def settings(self) -> dict[str, str]:
        """Settings of a session. They are not asked for at its start, since poolers refuse that."""
        return {
            'statement_timeout': f'{math.ceil(self.statement * 1000)}ms',
            'lock_timeout': f'{math.ceil(self.lock * 1000)}ms',
            'idle_in_transaction_session_timeout': f'{math.ceil(self.idle * 1000)}ms',
            'synchronous_commit': 'on',
            'default_transaction_isolation': 'read committed',
        }

    def sql(self, local: bool) -> str:
        """One statement that sets them, for the transaction or for the session."""
        return 'SELECT ' + ', '.join(f"set_config('{name}', '{value}', {str(local).lower()})" for name, value in self.settings().items())


def agent_limits(config: CoordinationConfig) -> Limits:
    """For the agent: a heartbeat must never have to wait for long behind another request."""
    statement = max(0.5, min(config.heartbeat_interval_sec, config.heartbeat_timeout_sec / 5))
    return Limits(statement, statement * 0.8, max(statement, min(1.0, config.heartbeat_timeout_sec)))


def call_limits(config: CoordinationConfig) -> Limits:
    """For calls of the API: more time for a statement, but a stopped process keeps no lock for longer."""
    statement = max(5.0, config.heartbeat_timeout_sec)
    return Limits(statement, statement * 0.9, max(1.0, agent_limits(config).idle))


def resolve(host: str, port: int, deadline: float) -> list[str | None]:
    """Addresses of a host. Looking them up cannot be interrupted, so that it is left to a thread that may outlast the wait."""
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
        raise DatabaseUnavailable(f'the host name cannot be resolved: {problems[0]}') from problems[0]
    if not found:
        raise StoreTimeout('the host name was not resolved in time')
    return found


def explain(config: CoordinationConfig, where: str, error: Exception) -> str:
    text = text_of(error)
    # Before a connection is there, libpq tells no SQLSTATE.
    if f'database "{config.dbname}" does not exist' in text:
        return f'PostgreSQL at {where} has no database {config.dbname!r}: create it with `createdb {config.dbname}`'
    return f'cannot connect to PostgreSQL at {where}, database {config.dbname!r}, user {config.user!r}: {text}'


def text_of(error: Exception) -> str:
    return ' '.join(str(error).split()) or type(error).__name__
