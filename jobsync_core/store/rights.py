"""What a node's role needs in the database: the one list behind `init-db --role`, the doctor and
the error of a node that lacks something.

All four rights on each table, whether or not this version uses them: so a role need not be changed
for each version that does. No right to create, change or own anything is among them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import ConfigurationError, JobSyncError
from .base import Store
from .tables import VIEWS, Tables

__all__ = ['Right', 'RightStore', 'check_role', 'describe', 'grants', 'needed']

_TABLE_RIGHTS = ('SELECT', 'INSERT', 'UPDATE', 'DELETE')


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
            for privilege in (('SELECT',) if name in VIEWS else _TABLE_RIGHTS)
        ),
        *(
            Right('EXECUTE', 'FUNCTION', schema, prefix + name, arguments)
            for name, arguments in tables.functions.items()
        ),
    ]


def describe(rights: Iterable[Right]) -> str:
    """Rights in words, by what they are on: 'INSERT, UPDATE on "public"."sync_node"; …'."""
    found: dict[str, list[str]] = {}
    for right in rights:
        kind = '' if right.kind == 'TABLE' else f'{right.kind.lower()} '
        found.setdefault(kind + right.thing, []).append(right.privilege)
    return '; '.join(f'{", ".join(privileges)} on {thing}' for thing, privileges in found.items())


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


class RightStore(Store):
    """What a role may do with the tables."""

    def lacking(self, role: str | None = None) -> list[Right]:
        """Those of the needed rights that a role does not have; what does not exist counts as
        lacking.

        Args:
            role: Whose rights; None: the connection's own.
        """
        wanted = needed(self._tables, self.connection.info.dbname)
        rows = self._rows(
            'right.lacking',
            {
                'privileges': [right.privilege for right in wanted],
                'kinds': [right.kind for right in wanted],
                'schemas': [right.schema for right in wanted],
                'names': [right.name for right in wanted],
                'arguments': [right.arguments for right in wanted],
                'role': role,
            },
        )
        return [wanted[number - 1] for (number,) in rows]

    def policies(self) -> list[str]:
        """Tables of which row-level security hides rows from this role."""
        tables = self._tables
        rows = self._rows('right.policies', {'schema': tables.schema, 'prefix': tables.appname})
        return [f'{_quoted(tables.schema)}.{_quoted(name)}' for (name,) in rows]

    def grant(self, role: str) -> None:
        """Make the role and give it its rights.

        Raises:
            JobSyncError: Something is lacking afterwards: whoever grants what he may not grant is
                only warned by PostgreSQL.
        """
        ((database,),) = self._rows('right.database')
        with self.connection.cursor() as cursor:
            for statement in grants(self._tables, database, role):
                cursor.execute(statement)
        left = self.lacking(role)
        if left:
            raise JobSyncError(
                f'this user may not grant {describe(left)}: run `jobsync init-db --role {role}` as '
                'the owner of the tables'
            )


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
