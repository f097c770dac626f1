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

__all__ = ['PINNED_PATH', 'Location', 'default_scope', 'locate', 'location_of']

#: The path of JobSync's own statements. pg_temp is named so that it comes last: unnamed, it would
#: come first.
PINNED_PATH = 'pg_catalog, pg_temp'

_ROLES_PATH = """
SET LOCAL search_path TO DEFAULT;
SELECT pg_catalog.current_schemas(false)::pg_catalog.text[],
    pg_catalog.current_setting('search_path'), current_user::pg_catalog.text"""

# Of several schemas, one whose table belongs to this role, to a superuser or to the database's
# owner comes first: whoever may create things in a schema at the beginning of the path cannot put
# other tables in the place of those that are there.
_FIND = f"""
SET LOCAL search_path TO {PINNED_PATH};
SELECT s.name,
       EXISTS (SELECT FROM pg_attribute AS a WHERE a.attrelid = c.oid AND a.attname = 'scope' AND
           NOT a.attisdropped)
       AND has_schema_privilege(n.oid, 'USAGE') AND has_table_privilege(c.oid, 'SELECT')
FROM unnest(%s::text[]) WITH ORDINALITY AS s (name, place)
    JOIN pg_namespace AS n ON n.nspname = s.name
    JOIN pg_class AS c ON c.relnamespace = n.oid AND c.relname = %s
    JOIN pg_roles AS o ON o.oid = c.relowner
    JOIN pg_roles AS me ON me.rolname = current_user
ORDER BY NOT (o.rolsuper OR o.oid = me.oid OR (NOT me.rolsuper AND pg_has_role(o.oid, 'MEMBER'))
              OR o.oid = (SELECT d.datdba FROM pg_database AS d WHERE d.datname =
                  current_database())), s.place
LIMIT 1"""

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
        usable, setting, user = run(_ROLES_PATH, ())[0]
        # Where the role may use none of them, the server's error names the right that is missing,
        # if it is asked for a table there.
        path = (
            list(usable)
            or [
                user if name == '$user' else name
                for name in next(csv.reader([setting], skipinitialspace=True), [])
            ][::-1]
        )
    found = run(_FIND, (path, location.appname + 'cluster'))
    if not found:
        location.schema = path[0] if path else None
        location.scope = default_scope(location.schema)
        return
    schema, has_scope = found[0]
    scopes: Sequence[Sequence[Any]] = ()
    if has_scope:
        quoted = schema.replace('"', '""')
        scopes = run(
            f'SET LOCAL search_path TO {PINNED_PATH}; SELECT scope FROM '
            f'"{quoted}"."{location.appname}cluster"',
            (),
        )
    location.schema, location.scope = schema, str(scopes[0][0]) if scopes else ''
    location.found = True
