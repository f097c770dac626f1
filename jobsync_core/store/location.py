"""In which schema a cluster's tables are: found once per process, as soon as it has a connection,
and then part of every name.

Without a setting they are in the first schema of the role's search_path, or where that path finds
them already. JobSync's own sessions have no use for that path: theirs is pinned to the system's
schema, so that nobody else's function, operator or table can take the place of what a statement
means.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..config import CoordinationConfig
from .statements import catalog

__all__ = ['PINNED_PATH', 'Location', 'default_scope', 'locate', 'location_of']

#: The path of JobSync's own statements; queries/location.sql has it as well, and says why.
PINNED_PATH = 'pg_catalog, pg_temp'

Run = Callable[[str, Sequence[object]], Sequence[Sequence[Any]]]


@dataclass
class Location:
    """Where a cluster's tables are.

    Args:
        appname: Their prefix.
        schema: Their schema; None until a connection has been opened, if no setting names it.
        scope: What distinguishes the cluster's channel and locks from those of the same appname in
            another schema: '' in `public`, and for clusters from before there was a difference.
        found: Whether the tables have been seen there; until then they may come to be elsewhere.
    """

    appname: str
    schema: str | None
    scope: str = ''
    found: bool = False


_known: dict[tuple[object, ...], Location] = {}


def location_of(config: CoordinationConfig) -> Location:
    """The location of a config's cluster: all parts of a process share it."""
    options = tuple(sorted((name, str(value)) for name, value in config.connection_options.items()))
    key = (
        config.host,
        str(config.port),
        config.dbname,
        config.user,
        config.appname,
        config.schema,
        options,
    )
    fresh = Location(config.appname, config.schema, default_scope(config.schema))
    return _known.setdefault(key, fresh)


def default_scope(schema: str | None) -> str:
    """The scope of a cluster that is made in a schema now."""
    return '' if schema in (None, 'public') else str(schema)


def locate(location: Location, config: CoordinationConfig, run: Run) -> None:
    """Find the tables, or the schema in which they will be created.

    Args:
        location: What is filled in.
        config: The cluster's settings.
        run: Runs a string of statements as one transaction and returns the last rows.

    Raises:
        psycopg2.Error: The server refused.
    """
    if config.schema is not None:
        path: list[str] = [config.schema]
    else:
        usable, setting, user = run(_sql('location.roles_path'), ())[0]
        # Where the role may use none of them, the server's error names the right that is missing,
        # if it is asked for a table there.
        path = (
            list(usable)
            or [
                user if name == '$user' else name
                for name in next(csv.reader([setting], skipinitialspace=True), [])
            ][::-1]
        )
    found = run(_sql('location.find'), (path, location.appname + 'cluster'))
    if not found:
        location.schema = path[0] if path else None
        location.scope = default_scope(location.schema)
        return
    schema, has_scope = found[0]
    scopes: Sequence[Sequence[Any]] = ()
    if has_scope:
        quoted = schema.replace('"', '""')
        scopes = run(_sql('location.scope', cluster=f'"{quoted}"."{location.appname}cluster"'), ())
    location.schema, location.scope = schema, str(scopes[0][0]) if scopes else ''
    location.found = True


def _sql(name: str, **names: str) -> str:
    return catalog().render(name, names, {})
