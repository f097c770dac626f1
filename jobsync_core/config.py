"""The settings of a cluster, checked when they are written down."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import ClassVar

from .assignment.hashing import HASH_FUNCTIONS
from .database_url import parse_database_url
from .environment import PREFIX, check_variables, from_text
from .errors import ConfigurationError
from .secret import SECRET_OPTIONS, hide

__all__ = ['LEASE_FRACTION', 'CoordinationConfig']

MAX_TOKENS = 1_000_000
#: Part of the heartbeat timeout for which a heartbeat entitles a node to claim. The rest is the
#: margin that covers clock rates that differ by 1 % each way, with room to spare.
LEASE_FRACTION = 0.9
_APPNAME = re.compile(r'[a-z_][a-z0-9_]{0,39}\Z')
_SCHEMA = re.compile(r'[a-z_][a-z0-9_]{0,62}\Z')
#: Parameters of libpq that have a setting of their own, or that JobSync sets itself: in
#: connection_options they would be overridden.
_SETTINGS = ('host', 'port', 'dbname', 'user', 'password')
_FIXED = {
    'client_encoding': 'JobSync speaks UTF-8',
    'service': (
        'what it says of host, port, dbname and user would be overridden: give these as '
        'settings of JobSync, the rest one by one'
    ),
}


@dataclass(frozen=True, kw_only=True)
class CoordinationConfig:
    """How a node reaches the database and how its cluster behaves.

    Args:
        host: Database host, a directory of Unix sockets, or several hosts separated by commas; of
            several, the writable one is used.
        port: Port, or one per host separated by commas.
        dbname, user, password: As PostgreSQL knows them. The password is never shown.
        appname: Prefix of every table; folded to lower case; a letter or `_`, then letters, digits
            and `_`, at most 40 in all.
        schema: The schema of the tables; folded to lower case. None: the first of the role's
            search_path, usually `public`, or the one on that path that has them already.
        total_tokens: Hash slots of the cluster, 1 to 1,000,000; equal on all nodes.
        minimum_nodes: Nodes that must have registered when `wait_on_enter` ends.
        heartbeat_interval_sec: Seconds between heartbeats.
        heartbeat_timeout_sec: Seconds without a heartbeat after which a node counts as dead; longer
            than the interval.
        rebalance_check_interval_sec: Seconds between fallback checks, should a notification be
            lost.
        hash_function: 'double_sha256', 'sha256' or 'md5'; equal on all nodes.
        connect_timeout_sec: Seconds that one connection attempt may take, per host.
        release_timeout_sec: Seconds that `on_release` may hold up a hand-over.
        listen: False where LISTEN does not work (a transaction-pooling PgBouncer): polling alone
            then.
        max_lost: How many attempts at a key of `once` or `exactly_once` may be lost, as their
            process died or was taken for dead; then the key is dead: nothing begins it before an
            operator says so. 0: any number. Attempts that raise do not count.
        connection_options: Further libpq parameters, for example {'sslmode': 'require'}. They win
            over what JobSync would ask of libpq by itself (application_name, keepalives,
            target_session_attrs …), and `connect_timeout` over connect_timeout_sec. What has a
            setting of its own (host, port, dbname, user, password) is refused here.

    Raises:
        ConfigurationError: A value cannot work. It is a ValueError.
    """

    host: str = 'localhost'
    port: int | str = 5432
    dbname: str = 'jobsync'
    user: str = 'postgres'
    password: str | None = field(default='postgres', repr=False)
    appname: str = 'sync_'
    schema: str | None = None
    total_tokens: int = 10_000
    minimum_nodes: int = 1
    heartbeat_interval_sec: float = 5
    heartbeat_timeout_sec: float = 15
    rebalance_check_interval_sec: float = 30
    hash_function: str = 'double_sha256'
    connect_timeout_sec: float = 5
    release_timeout_sec: float = 5
    listen: bool = True
    max_lost: int = 3
    connection_options: Mapping[str, str] = field(default_factory=dict, repr=False)
    #: The variable that would have said where the database is, if nothing did; for the error of a
    #: connection that fails.
    unset: ClassVar[str] = ''

    def __post_init__(self) -> None:
        for name in ('host', 'dbname', 'user', 'appname', 'hash_function'):
            value = getattr(self, name)
            if not isinstance(value, str) or not value or not value.isprintable():
                raise ConfigurationError(
                    f'{name}={value!r}: give a non-empty string without control characters'
                )
        self._check_place()
        object.__setattr__(self, 'appname', self.appname.lower())
        if not _APPNAME.match(self.appname):
            raise ConfigurationError(
                f'appname={self.appname!r} is no table prefix: use a letter or _, then letters, '
                'digits and _, at most 40 characters'
            )
        self._check_schema()
        if self.hash_function not in HASH_FUNCTIONS:
            raise ConfigurationError(
                f'hash_function={self.hash_function!r} is unknown: use one of '
                f'{", ".join(sorted(HASH_FUNCTIONS))}'
            )
        if self.password is not None and (
            not isinstance(self.password, str) or '\0' in self.password
        ):
            raise ConfigurationError('password must be a string without NUL characters, or None')
        if not isinstance(self.listen, bool):
            raise ConfigurationError(f'listen={self.listen!r}: give True or False')
        object.__setattr__(self, 'password', hide(self.password))
        self._check_options()
        self._check_ports()
        self._check_integer('total_tokens', 1, MAX_TOKENS)
        self._check_integer('minimum_nodes', 1, None)
        self._check_integer('max_lost', 0, 2**31 - 1)
        for name in (
            'heartbeat_interval_sec',
            'heartbeat_timeout_sec',
            'rebalance_check_interval_sec',
            'connect_timeout_sec',
        ):
            self._check_seconds(name, zero=False)
        self._check_seconds('release_timeout_sec', zero=True)
        if self.heartbeat_interval_sec >= self.heartbeat_timeout_sec * LEASE_FRACTION:
            raise ConfigurationError(
                f'heartbeat_timeout_sec={self.heartbeat_timeout_sec} leaves no room for '
                f'heartbeat_interval_sec={self.heartbeat_interval_sec}: a lease lasts '
                f'{LEASE_FRACTION:.0%} of the timeout and must outlast '
                f'the interval; three times the interval is usual'
            )

    def _check_place(self) -> None:
        """A URL in the place of one of its parts would be shown, with its password, in each error
        of a connection.
        """
        for name in ('host', 'dbname', 'user'):
            if '://' in getattr(self, name):
                raise ConfigurationError(
                    f'{name} is a URL: give it as JOBSYNC_DATABASE_URL, or to '
                    'CoordinationConfig.from_url'
                )
        # A directory of sockets may have an @ in it, an abstract one begins with it.
        hosts = [name.strip() for name in self.host.split(',')]
        if any('@' in name[1:] and not name.startswith('/') for name in hosts):
            raise ConfigurationError(
                'host has an @ in it: user and password have settings of their own'
            )

    def _check_schema(self) -> None:
        if self.schema is None:
            return
        name = self.schema.lower() if isinstance(self.schema, str) else ''
        if not _SCHEMA.match(name) or name.startswith('pg_') or name == 'information_schema':
            raise ConfigurationError(
                f'schema={self.schema!r} cannot hold the tables: use a letter or _, then letters, '
                'digits and _, at most 63 characters, '
                "and none of the system's own (pg_…, information_schema); or None for the first "
                "schema of the role's search_path"
            )
        object.__setattr__(self, 'schema', name)

    def _check_options(self) -> None:
        options = self.connection_options
        if not isinstance(options, Mapping) or not all(isinstance(name, str) for name in options):
            raise ConfigurationError(
                "connection_options: give a dict of libpq parameters, such as {'sslmode': "
                "'require'}"
            )
        for name in options:
            if name in _SETTINGS:
                raise ConfigurationError(
                    f'connection_options names {name!r}, for which there is a setting: give it as '
                    f'{name}=… (or in the database URL, or '
                    f'as JOBSYNC_{name.upper()}), and take it out of connection_options'
                )
            if name in _FIXED:
                raise ConfigurationError(
                    f'connection_options names {name!r}: take it out; {_FIXED[name]}'
                )
        if 'hostaddr' in options and ',' in self.host:
            raise ConfigurationError(
                "connection_options names 'hostaddr' beside several hosts: give the addresses as "
                "host='…,…'"
            )
        if 'connect_timeout' in options:
            try:
                object.__setattr__(self, 'connect_timeout_sec', float(options['connect_timeout']))
            except (TypeError, ValueError):
                raise ConfigurationError(
                    "connection_options: 'connect_timeout' is no number of seconds"
                ) from None
        hidden = {
            name: hide(value) if name in SECRET_OPTIONS else value
            for name, value in options.items()
        }
        object.__setattr__(self, 'connection_options', hidden)

    def _check_ports(self) -> None:
        if isinstance(self.port, bool) or not isinstance(self.port, (int, str)):
            raise ConfigurationError(f'port={self.port!r}: give a number from 1 to 65535')
        ports = str(self.port).split(',')
        if not all(
            part.strip().isdecimal() and len(part) < 100 and 1 <= int(part) <= 65535
            for part in ports
        ):
            raise ConfigurationError(
                f'port={self.port!r}: give a number from 1 to 65535, or one per host, separated '
                'by commas'
            )
        if len(ports) not in (1, len(self.hosts)):
            raise ConfigurationError(
                f'port={self.port!r} gives {len(ports)} ports for {len(self.hosts)} hosts: give '
                'one, or one per host'
            )

    def _check_integer(self, name: str, least: int, most: int | None) -> None:
        value = getattr(self, name)
        if (
            isinstance(value, bool)
            or not isinstance(value, int)
            or value < least
            or (most is not None and value > most)
        ):
            bound = f'from {least:,} to {most:,}' if most is not None else f'of at least {least}'
            raise ConfigurationError(f'{name}={value!r}: give a whole number {bound}')

    def _check_seconds(self, name: str, zero: bool) -> None:
        value = getattr(self, name)
        good = (
            isinstance(value, (int, float))
            and not isinstance(value, bool)
            and (0 if zero else 1e-3) <= value <= 86_400
        )
        if not good:
            raise ConfigurationError(
                f'{name}={value!r}: give seconds, {"zero" if zero else "more than zero"} to 86400'
            )

    @property
    def hosts(self) -> tuple[tuple[str, int], ...]:
        """Host and port pairs, in the order in which they are tried."""
        names = [name.strip() for name in self.host.split(',')]
        ports = [int(part) for part in str(self.port).split(',') if part.strip().isdecimal()]
        if len(ports) != len(names):
            ports = ports[:1] * len(names) if ports else [5432] * len(names)
        return tuple(zip(names, ports, strict=True))

    @property
    def lease_sec(self) -> float:
        """Seconds for which one heartbeat, counted from its sending, entitles to claim."""
        return self.heartbeat_timeout_sec * LEASE_FRACTION

    @classmethod
    def from_url(cls, url: str, **settings: object) -> CoordinationConfig:
        """Read `postgresql://user:password@host:port/dbname?sslmode=require`.

        Args:
            url: A libpq URL. Several hosts (`a:5432,b:5433`) and a socket directory
                (`?host=/run/pg`) work; parts may be percent-encoded.
            settings: Any other field of the class; they win over the URL, connection_options one by
                one.

        Raises:
            ConfigurationError: The URL or a setting cannot work. No part of a URL that cannot be
                read is repeated.
        """
        found = parse_database_url(url)
        options, given = found['connection_options'], settings.get('connection_options', {})
        if isinstance(options, dict) and isinstance(given, Mapping):
            if 'connect_timeout_sec' in settings:
                options.pop('connect_timeout', None)
            settings['connection_options'] = {**options, **given}
        return cls._checked({**found, **settings})

    @classmethod
    def from_env(
        cls, environ: Mapping[str, str] = os.environ, prefix: str = PREFIX, **settings: object
    ) -> CoordinationConfig:
        """Read `JOBSYNC_DATABASE_URL` and `JOBSYNC_<FIELD>` for each field, for example
        `JOBSYNC_TOTAL_TOKENS=50000`. connection_options have no variable: the URL has them,
        `?sslmode=require`.

        Args:
            environ: Where to look.
            prefix: What the names begin with.
            settings: Fields that win over the environment.

        Raises:
            ConfigurationError: A value cannot work, or a variable's name is nearly that of a
                setting; the message names the variable.
        """
        if prefix == PREFIX:
            own = {item.name for item in fields(cls)} - {'connection_options'}
            check_variables(environ, {'database_url', *own})
        found: dict[str, object] = {}
        for item in fields(cls):
            raw = environ.get(prefix + item.name.upper())
            if (
                raw is not None
                and item.name != 'connection_options'
                and not (item.name == 'port' and raw.startswith('tcp://'))
            ):
                # a port stays as it is written
                default = item.default if item.name != 'port' else ''
                found[item.name] = from_text(prefix + item.name.upper(), raw, default)
        url = environ.get(prefix + 'DATABASE_URL')
        if url:
            return cls.from_url(url, **{**found, **settings})
        config = cls._checked({**found, **settings})
        if not {'host', 'dbname'} & {*found, *settings}:
            object.__setattr__(config, 'unset', prefix + 'DATABASE_URL')
        return config

    @classmethod
    def _checked(cls, values: Mapping[str, object]) -> CoordinationConfig:
        unknown = sorted(set(values) - {item.name for item in fields(cls)})
        if unknown:
            raise ConfigurationError(
                f'unknown setting {unknown[0]!r}: the settings are '
                f'{", ".join(item.name for item in fields(cls))}'
            )
        return cls(**values)  # type: ignore[arg-type]  # __post_init__ checks each value

    @staticmethod
    def recommended_tokens(expected_tasks: int, expected_nodes: int) -> int:
        """The guide's formula: ten tokens a task, a hundred a node, 10,000 at least, 1,000,000 at
        most.
        """
        for name, value in (('expected_tasks', expected_tasks), ('expected_nodes', expected_nodes)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigurationError(f'{name}={value!r}: give a whole number of at least 1')
        return min(MAX_TOKENS, max(expected_tasks * 10, expected_nodes * 100, 10_000))
