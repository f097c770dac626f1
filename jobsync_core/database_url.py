"""Reading a database URL. An error never repeats a part of it: what cannot be read may be the
password.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from .errors import ConfigurationError

__all__ = ['parse_database_url']

_FORM = 'use postgresql://user:password@host:port/dbname'
_ENCODE = (
    'write special characters of user, password and dbname percent-encoded: @ as %40, / as '
    '%2F, : as %3A, # as %23, ? as %3F, [ as %5B, ] as %5D'
)
#: Schemes that people mistake for the right one. No other is repeated.
_OTHERS = frozenset(
    {
        'mysql',
        'mariadb',
        'sqlite',
        'mssql',
        'oracle',
        'redis',
        'rediss',
        'amqp',
        'amqps',
        'http',
        'https',
        'jdbc',
    }
)
_HOST = re.compile(r'[\w.\-]+|%2[fF][^@:?#]*|\[[0-9a-fA-F:.%]+\]')
_PERCENT = re.compile(r'%(?![0-9a-fA-F]{2})')
#: The parts of a URL that its query may give as well.
_FIELDS = ('host', 'port', 'user', 'password', 'dbname')


def parse_database_url(url: str) -> dict[str, object]:
    """The settings that `postgresql://user:password@host:port/dbname?option=value` names.

    Args:
        url: A libpq URL. Several hosts (`a:5432,b:5433`), IPv6 addresses in brackets and socket
            directories (`?host=/run/pg`) work.

    Returns:
        Those of host, port, user, password and dbname that it names (password: None where there is
            none), and connection_options.

    Raises:
        ConfigurationError: It cannot be read. No part of the URL is repeated.
    """
    parts = _split(url)
    userinfo, _, location = parts.netloc.rpartition('@')
    user, _, password = userinfo.partition(':')
    found: dict[str, object] = {'password': unquote(password) if password else None}
    if user:
        found['user'] = unquote(user)
    if location:
        found.update(_hosts(location))
    dbname = parts.path[1:]
    if '/' in dbname or ':' in dbname:
        raise ConfigurationError(
            f'the database name in the database URL has a / or : in it: {_ENCODE}'
        )
    if dbname:
        found['dbname'] = unquote(dbname)
    options = _options(parts.query)
    for port in options.get('port', '').split(',') if 'port' in options else ():
        _check_port(port)
    found.update({name: options.pop(name) for name in _FIELDS if name in options})
    found['connection_options'] = options
    return found


def _split(url: object) -> SplitResult:
    """The URL's parts, once it is sure that user and password lie between `//` and the last `@`
    before the host.
    """
    try:
        parts = urlsplit(url) if isinstance(url, str) else None
    except ValueError:
        # A bracket that belongs to no IPv6 address, or a character that looks like one of a URL's.
        if isinstance(url, str) and url.lower().startswith(('postgresql', 'postgres')):
            raise ConfigurationError(f'the database URL cannot be taken apart: {_ENCODE}') from None
        parts = None
    if parts is None or (not parts.scheme and not parts.netloc):
        raise ConfigurationError(f'the database URL cannot be read: {_FORM}')
    if parts.scheme not in ('postgresql', 'postgres'):
        plain = parts.scheme.partition('+')
        if plain[0] in ('postgresql', 'postgres') and plain[2].isalnum():
            raise ConfigurationError(
                f'the database URL names a driver (postgresql+…): leave it out, {_FORM}'
            )
        named = (
            f' begins with {parts.scheme}://'
            if parts.scheme in _OTHERS
            else ' does not begin with postgresql://'
        )
        raise ConfigurationError(f'the database URL{named}: {_FORM}')
    if not isinstance(url, str) or not url[len(parts.scheme) :].startswith('://'):
        raise ConfigurationError(f'the database URL lacks the // after postgresql: {_FORM}')
    if any(not character.isprintable() or character.isspace() for character in url):
        raise ConfigurationError(
            f'the database URL contains white space or control characters: {_ENCODE}'
        )
    if parts.fragment or '#' in url or '@' in parts.path or '@' in parts.query:
        raise ConfigurationError(f'the database URL cannot be taken apart: {_ENCODE}')
    if _PERCENT.search(url):
        raise ConfigurationError(
            'the database URL has a % that begins no two hexadecimal digits: write % itself as '
            f'%25, and {_ENCODE}'
        )
    return parts


def _hosts(location: str) -> dict[str, object]:
    hosts, ports = [], []
    for item in location.split(','):
        host, port = _split_port(item)
        if not host and port:
            host = 'localhost'
        if not _HOST.fullmatch(host):
            raise ConfigurationError(f'the host in the database URL is none: {_ENCODE}')
        _check_port(port)
        hosts.append(unquote(host.strip('[]')))
        ports.append(port)
    return {'host': ','.join(hosts), 'port': ','.join(ports)}


def _check_port(port: str) -> None:
    if not (port.isdecimal() and port.isascii() and 1 <= int(port[:6]) <= 65535):
        raise ConfigurationError(
            'the port in the database URL is no number from 1 to 65535; if it is a part of the '
            f'password, {_ENCODE}'
        )


def _split_port(item: str) -> tuple[str, str]:
    if item.startswith('['):
        host, bracket, rest = item.partition(']')
        return host + bracket, rest.removeprefix(':') or '5432'
    host, _, port = item.partition(':')
    return host, port or '5432'


def _options(query: str) -> dict[str, str]:
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query))
    except ValueError:
        raise ConfigurationError(
            f'the part of the database URL after ? is no list of option=value: {_ENCODE}'
        ) from None
    options: Mapping[str, str] = dict(pairs)
    if not all(re.fullmatch('[a-z_]+', name) for name in options):
        raise ConfigurationError(
            f'the part of the database URL after ? names an option that libpq has not: {_ENCODE}'
        )
    return dict(options)
