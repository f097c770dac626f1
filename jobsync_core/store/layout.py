"""What the tables of a cluster are to be, version by version, and what stands in the database."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..config import CoordinationConfig
from ..errors import SchemaConflict
from .base import Store
from .location import PINNED_PATH, default_scope
from .statements import read_migration
from .tables import RELATIONS, VIEWS, Tables, quote_name

__all__ = ['MIGRATIONS', 'SCHEMA_VERSION', 'LayoutStore', 'Migration', 'render_schema']

_KINDS = {
    'r': 'table',
    'v': 'view',
    'm': 'materialized view',
    'p': 'partitioned table',
    'f': 'foreign table',
    'i': 'index',
}


@dataclass(frozen=True)
class Migration:
    """What leads to a schema version from the one before.

    Args:
        number: The version.
        name: Of the file in `migrations/`. A file, once released, never changes; nor does a file of
            `functions/`, whose name has a version.
    """

    number: int
    name: str

    def sql(self, tables: Tables) -> str:
        """Its statements, for these tables."""
        return tables.migration(read_migration(self.name))


MIGRATIONS = (
    Migration(1, '01_tables'),
    Migration(2, '02_schedules'),
    Migration(3, '03_execution_functions'),
    Migration(4, '04_node_age'),
    Migration(5, '05_housekeeping_indexes'),
    Migration(6, '06_qualified_names'),
    Migration(7, '07_epochs'),
    Migration(8, '08_queue_belonging'),
    Migration(9, '09_former_keys'),
    Migration(10, '10_queue_groups'),
    Migration(11, '11_attempts'),
)
SCHEMA_VERSION = MIGRATIONS[-1].number


def render_schema(appname: str, schema: str | None = None) -> str:
    """The statements that create the tables, for whoever does so by hand.

    Args:
        appname: Their prefix.
        schema: Where they go; default `public`.
    """
    tables = Tables(appname, schema or 'public', default_scope(schema))
    parts = [
        '-- Names are qualified; what stands without a schema is of PostgreSQL itself.',
        f'SET search_path = {PINNED_PATH};\n',
    ]
    if schema is not None:
        parts.append(f'CREATE SCHEMA IF NOT EXISTS {quote_name(schema)};\n')
    parts.append(
        '-- Each version is a transaction of its own. It gives up soon where somebody has locked '
        'a table, since nodes queue up\n'
        '-- behind it: then run all of this again, which changes nothing that is there.\n'
    )
    parts += [
        f"BEGIN;\nSET LOCAL lock_timeout = '2s';\n{migration.sql(tables)}COMMIT;\n"
        for migration in MIGRATIONS
    ]
    if tables.scope:
        parts.append(
            f"UPDATE {tables.cluster} SET scope = '{tables.scope}'\n"
            f'WHERE version = 0 AND planned IS NULL AND NOT EXISTS (SELECT FROM {tables.node});\n'
        )
    return '\n'.join([*parts, 'RESET search_path;'])


class LayoutStore(Store):
    """What stands in the database under a cluster's names."""

    def look(self, newest: int = SCHEMA_VERSION) -> tuple[int, bool]:
        """The schema version of the tables, 0 where there are none; and whether all are there, and
        the functions.

        Args:
            newest: The version that this program makes.

        Raises:
            SchemaConflict: They are not JobSync's, or newer than this program.
        """
        tables = self._tables
        relations = self._relations(tables.all.values())
        version = 0
        if 'schema_version' in relations[tables.cluster][1]:
            version = self._rows('layout.version')[0][0] or newest
        if version > newest:
            raise SchemaConflict(
                f'the tables {tables.appname}* have schema version {version}, and this program '
                f'knows {newest}: upgrade JobSync here, or choose another appname'
            )
        for name, quoted in tables.all.items():
            kind, columns = relations[quoted]
            expected = version > 0 and kind in (('v',) if name in VIEWS else ('r', 'p'))
            if kind and not (
                expected and (version < newest or columns >= set(RELATIONS[name].split()))
            ):
                raise SchemaConflict(
                    f'{_KINDS.get(kind, "relation")} {quoted} exists already and is not of the '
                    'layout that this version of JobSync makes: choose another appname than '
                    f'{tables.appname!r}, or rename or drop {quoted} if nothing needs it'
                )
        there = all(kind for kind, _ in relations.values())
        return version, there and self._has_functions()

    def is_in_place(self, newest: int = SCHEMA_VERSION) -> bool:
        """Whether all is there, of the version that this program makes."""
        try:
            return self.look(newest) == (newest, True)
        except SchemaConflict:
            return False  # somebody may be migrating right now: judged again under the lock

    def take_turn(self, wait: bool, lock_sec: float, whole_sec: float) -> bool:
        """Take the cluster's lock until the end of the transaction; whether it is had.

        Args:
            wait: Whether to wait for it.
            lock_sec: Seconds that this, and then each further statement, may wait for a lock.
            whole_sec: Seconds that each further statement may take.
        """
        first, second = self._tables.advisory
        self._rows(
            'layout.limit', {'lock': _milliseconds(lock_sec), 'statement': _milliseconds(whole_sec)}
        )
        ((has,),) = self._rows(
            'layout.wait_for_turn' if wait else 'layout.try_for_turn',
            {'first': first, 'second': second},
        )
        return bool(has)

    def limit_locks(self, seconds: float) -> None:
        """Let each further statement of the transaction wait for a lock for so long at most."""
        self._rows('layout.limit_locks', {'lock': _milliseconds(seconds)})

    def create_place(self, schema: str) -> None:
        """Create the schema where it is missing: even IF NOT EXISTS asks for the right to create
        one.
        """
        ((there,),) = self._rows('layout.has_place', {'schema': schema})
        if not there:
            self._run('layout.create_place')

    def migrate(self, migrations: Sequence[Migration]) -> None:
        """Bring the tables forward, one version after the other."""
        for migration in migrations:
            with self.connection.cursor() as cursor:
                cursor.execute(migration.sql(self._tables))
            self._run('layout.raise_version', {'version': migration.number})

    def settle(self, config: CoordinationConfig) -> None:
        """Write what all nodes of a new cluster have in common."""
        self._run(
            'layout.settle',
            {
                'total_tokens': config.total_tokens,
                'hash_function': config.hash_function,
                'scope': self._tables.scope,
            },
        )

    def _relations(self, names: Iterable[str]) -> dict[str, tuple[str, set[str]]]:
        """Kind and columns of each relation; '' and none where it does not exist."""
        rows = self._rows('layout.relations', {'names': list(names)})
        return {name: (kind, set(columns.split())) for name, kind, columns in rows}

    def _has_functions(self) -> bool:
        tables = self._tables
        ((has,),) = self._rows(
            'layout.has_functions',
            {
                'signatures': [
                    f'{getattr(tables, name)}({arguments})'
                    for name, arguments in tables.functions.items()
                ]
            },
        )
        return bool(has)


def _milliseconds(seconds: float) -> str:
    return f'{seconds * 1000:.0f}ms'
