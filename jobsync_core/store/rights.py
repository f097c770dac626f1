"""What a node's role needs in the database: the one list behind `init-db --role`, the doctor and
the error of a node that lacks something.

All four rights on each table, whether or not this version uses them: so a role need not be changed
for each version that does. No right to create, change or own anything is among them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import ConfigurationError, JobSyncError

if TYPE_CHECKING:
    from psycopg2.extensions import connection as PgConnection

    from .tables import Tables

__all__ = ['Right', 'check_role', 'describe', 'grant', 'grants', 'lacking', 'needed', 'policies']

_TABLE_RIGHTS = ('SELECT', 'INSERT', 'UPDATE', 'DELETE')
_VIEWS = frozenset({'token'})


@dataclass(frozen=True)
class Right:
    """One right on one thing.

    Args:
        privilege: 'SELECT', 'EXECUTE' and so on.
        kind: 'DATABASE', 'SCHEMA', 'TABLE' or 'FUNCTION'.
        schema: Of a table or function; otherwise ''.
        name: Of the thing, not quoted.
        arguments: Types of a function's arguments.
    """

    privilege: str
    kind: str
    schema: str
    name: str
    arguments: str = ''

    @property
    def thing(self) -> str:
        """What it is on, for SQL."""
        name = f'{_quoted(self.schema)}.{_quoted(self.name)}' if self.schema else _quoted(self.name)
        return f'{name}({self.arguments})' if self.kind == 'FUNCTION' else name


def needed(tables: Tables, dbname: str) -> list[Right]:
    """Every right that a node, its plugin and the commands need."""
    schema, prefix = tables.schema, tables.appname
    return [
        Right('CONNECT', 'DATABASE', '', dbname),
        Right('USAGE', 'SCHEMA', '', schema),
        *(
            Right(privilege, 'TABLE', schema, prefix + name)
            for name in tables.all
            for privilege in (('SELECT',) if name in _VIEWS else _TABLE_RIGHTS)
        ),
        *(
            Right('EXECUTE', 'FUNCTION', schema, prefix + name, arguments)
            for name, arguments in tables.functions.items()
        ),
    ]


# By the catalogs, not by to_regclass(): that asks for rights itself. A column named in each test,
# as an unknown name would be an error.
_LACKING = """
SELECT w.number FROM unnest(%s::text[], %s::text[], %s::text[], %s::text[], %s::text[])
    WITH ORDINALITY AS w (privilege, kind, schema, name, arguments, number)
    CROSS JOIN (SELECT r.oid FROM pg_roles AS r WHERE r.rolname = coalesce(%s, current_user)) AS
        role
WHERE NOT CASE w.kind
    WHEN 'DATABASE' THEN EXISTS (
        SELECT FROM pg_database AS d WHERE d.datname = current_database() AND
            has_database_privilege(role.oid, d.oid, w.privilege))
    WHEN 'SCHEMA' THEN EXISTS (
        SELECT FROM pg_namespace AS n WHERE n.nspname = w.name AND has_schema_privilege(role.oid,
            n.oid, w.privilege))
    WHEN 'TABLE' THEN EXISTS (
        SELECT FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
        WHERE n.nspname = w.schema AND c.relname = w.name AND has_table_privilege(role.oid, c.oid,
            w.privilege))
    ELSE EXISTS (
        SELECT FROM pg_proc AS p JOIN pg_namespace AS n ON n.oid = p.pronamespace
        WHERE n.nspname = w.schema AND p.proname = w.name AND oidvectortypes(p.proargtypes) =
            w.arguments
          AND has_function_privilege(role.oid, p.oid, w.privilege))
    END
ORDER BY w.number"""


def lacking(connection: PgConnection, tables: Tables, role: str | None = None) -> list[Right]:
    """Those of the needed rights that a role does not have; what does not exist counts as lacking.

    Args:
        connection: Where to ask.
        tables: Names of the tables.
        role: Whose rights; None: the connection's own.
    """
    wanted = needed(tables, connection.info.dbname)
    with connection.cursor() as cursor:
        cursor.execute(
            _LACKING,
            (
                [right.privilege for right in wanted],
                [right.kind for right in wanted],
                [right.schema for right in wanted],
                [right.name for right in wanted],
                [right.arguments for right in wanted],
                role,
            ),
        )
        return [wanted[number - 1] for (number,) in cursor.fetchall()]


def describe(rights: Iterable[Right]) -> str:
    """Rights in words, by what they are on: 'INSERT, UPDATE on "public"."sync_node"; …'."""
    found: dict[str, list[str]] = {}
    for right in rights:
        kind = '' if right.kind == 'TABLE' else f'{right.kind.lower()} '
        found.setdefault(kind + right.thing, []).append(right.privilege)
    return '; '.join(f'{", ".join(privileges)} on {thing}' for thing, privileges in found.items())


def policies(connection: PgConnection, tables: Tables) -> list[str]:
    """Tables of which row-level security hides rows from this role."""
    with connection.cursor() as cursor:
        cursor.execute(
            """
            SELECT c.relname FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
            WHERE n.nspname = %s AND starts_with(c.relname, %s) AND c.relrowsecurity AND
                row_security_active(c.oid) ORDER BY 1
            """,
            (tables.schema, tables.appname),
        )
        return [f'{_quoted(tables.schema)}.{_quoted(name)}' for (name,) in cursor.fetchall()]


def check_role(name: str) -> str:
    """The name of a role, if it can be one.

    Raises:
        ConfigurationError: It cannot.
    """
    if (
        not name
        or len(name.encode(errors='replace')) > 63
        or not name.isprintable()
        or '\\' in name
        or (name.startswith('pg_') or name in ('public', 'none'))
    ):
        raise ConfigurationError(
            f'role {name!r}: give a name of at most 63 bytes, without backslashes and control '
            'characters, not pg_…, public or none'
        )
    return name


def grants(tables: Tables, dbname: str, role: str) -> list[str]:
    """Statements that make the role, unless there is one, and give it what a node needs. They may
    be run again.

    The role can log in as soon as somebody gives it a password; it is never part of a statement
    here.
    """
    quoted, literal = _quoted(check_role(role)), "'" + role.replace("'", "''") + "'"
    by_thing: dict[tuple[str, str], list[str]] = {}
    for right in needed(tables, dbname):
        by_thing.setdefault((right.kind, right.thing), []).append(right.privilege)
    create = (
        'DO $$ BEGIN\n    IF NOT EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname '
        f'OPERATOR(pg_catalog.=) {literal}) THEN\n'
        f'        CREATE ROLE {quoted} LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE;\n    END '
        'IF;\nEND $$'
    )
    return [
        create,
        *(
            f'GRANT {", ".join(privileges)} ON {kind} {thing} TO {quoted}'
            for (kind, thing), privileges in by_thing.items()
        ),
    ]


def grant(connection: PgConnection, tables: Tables, role: str) -> None:
    """Make the role and give it its rights.

    Raises:
        JobSyncError: Something is lacking afterwards: whoever grants what he may not grant is only
            warned by PostgreSQL.
    """
    with connection.cursor() as cursor:
        cursor.execute('SELECT current_database()')  # a pooler may know it by another name
        for statement in grants(tables, cursor.fetchall()[0][0], role):
            cursor.execute(statement)
    left: Sequence[Right] = lacking(connection, tables, role)
    if left:
        raise JobSyncError(
            f'this user may not grant {describe(left)}: run `jobsync init-db --role {role}` as '
            'the owner of the tables'
        )


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
