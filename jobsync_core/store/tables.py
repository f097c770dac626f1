"""The relations and functions of a cluster: their names, and what they consist of."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from typing import Any

from ..config import CoordinationConfig
from ..errors import JobSyncError
from .location import Location, locate, location_of
from .statements import catalog, fill

__all__ = ['FUNCTIONS', 'INDEXES', 'RELATIONS', 'VIEWS', 'Tables', 'quote_name']

#: Tables and views, with the columns that this version uses.
RELATIONS: Mapping[str, str] = {
    'cluster': (
        'total_tokens hash_function version lock_version schema_version planned scope '
        'epoch history former_until'
    ),
    'node': (
        'name created_on last_heartbeat beat incarnation state weight lease_sec host pid '
        'boot_id pid_namespace started groups held silent'
    ),
    'assignment': 'tokens node moving moving_to blocked version assigned_at',
    'ring': 'tokens node moving moving_to blocked version assigned_at',
    'queue_group': 'id name formed',
    'token': 'token_id node assigned_at version',
    'group_token': 'queue_group token_id node assigned_at version',
    'lock': 'task_id node_patterns reason created_at created_by expires_at pin queue',
    'rebalance': (
        'id triggered_at trigger_reason leader_node nodes_before nodes_after '
        'tokens_moved duration_ms'
    ),
    'claim': 'node task_id created_on date token incarnation child',
    'audit': 'created_on node task_id date token epoch',
    'execution': (
        'key state node incarnation host boot_id pid_namespace pid started fence '
        'attempts started_at finished_at result error expires_at lost message'
    ),
    'attempt': (
        'key slot number fence outcome node incarnation host pid started_at ended_at error '
        'expires_at'
    ),
    'queue': 'name node created_at kind gone_at broker place application',
    'node_queue': ('node home name kind broker place application created_at gone_at queue_group'),
    'schedule': 'name slot total_run_count entry updated_at',
}
#: Those of them that are views.
VIEWS = frozenset({'token', 'group_token'})
#: Functions, with the types of their arguments. Each pins its search_path, and names tables with
#: their schema. Processes of earlier versions go on calling a name while a newer text stands behind
#: it: a text that takes, gives or means something else, or needs another right, gets another name,
#: and the old one stays.
FUNCTIONS: Mapping[str, str] = {
    'begin_execution': 'text, text, text, text, text, text, integer, text',  # up to version 10
    'begin_attempt': 'text, text, text, text, text, text, integer, text, integer',
    'bury_key': 'text, bigint, text, text',
    'file_lost_attempt': (
        'text, integer, bigint, text, text, text, integer, timestamp with time zone, text'
    ),
    'finish_execution': 'jsonb, double precision, text, bigint',
}
#: Not qualified, as in CREATE INDEX; elsewhere write {schema}.{name of the index}.
INDEXES = (
    'node_age',
    'lock_expiry',
    'claim_token',
    'claim_life',
    'claim_promised',
    'audit_token',
    'execution_running',
    'execution_expiry',
    'attempt_expiry',
)


class Tables:
    """Names of one cluster's tables and functions, qualified and quoted for SQL.

    Attributes:
        appname: Their prefix.
    """

    appname: str
    node: str
    assignment: str
    ring: str
    queue_group: str
    token: str
    group_token: str
    lock: str
    rebalance: str
    claim: str
    audit: str
    execution: str
    attempt: str
    cluster: str
    queue: str
    node_queue: str
    schedule: str
    begin_execution: str
    begin_attempt: str
    bury_key: str
    file_lost_attempt: str
    finish_execution: str

    def __init__(self, appname: str, schema: str = 'public', scope: str = '') -> None:
        self._location = Location(appname.lower(), schema, scope, found=True)
        self.appname = self._location.appname
        self._texts: dict[tuple[str, ...], str] = {}

    @classmethod
    def of(cls, config: CoordinationConfig) -> Tables:
        """Those of a config's cluster. Where no setting names their schema, they have no names
        before a first connection is opened.
        """
        tables = cls.__new__(cls)
        tables._location = location_of(config)
        tables.appname = config.appname
        tables._texts = {}
        return tables

    def __repr__(self) -> str:
        return f'<Tables {self.label}*>'

    def __getattr__(self, name: str) -> str:
        if name not in RELATIONS and name not in FUNCTIONS:
            raise AttributeError(name)
        quoted = f'{quote_name(self.schema)}.{quote_name(self.appname + name)}'
        if self._location.found:
            self.__dict__[name] = quoted
        return quoted

    @property
    def are_found(self) -> bool:
        """Whether they have been seen in the database."""
        return self._location.found

    @property
    def schema(self) -> str:
        """The schema, not quoted.

        Raises:
            JobSyncError: There is none.
        """
        if self._location.schema is None:
            raise JobSyncError(
                "the role's search_path names no schema that it may use, so the tables have no "
                'place: set schema=…'
            )
        return self._location.schema

    @property
    def label(self) -> str:
        """Distinguishes the cluster from all others of the database, in the names of locks."""
        return f'{self._location.scope}.{self.appname}' if self._location.scope else self.appname

    @property
    def scope(self) -> str:
        return self._location.scope

    @property
    def channel(self) -> str:
        """Name of the NOTIFY channel, not quoted."""
        scope = self._location.scope
        return f'{self.appname}events' + (
            f'_{blake2b(scope.encode(), digest_size=6).hexdigest()}' if scope else ''
        )

    @property
    def advisory(self) -> tuple[int, int]:
        """Key of the cluster's advisory lock."""
        digest = blake2b(f'jobsync {self.label}'.encode(), digest_size=8).digest()
        return int.from_bytes(digest[:4], 'big', signed=True), int.from_bytes(
            digest[4:], 'big', signed=True
        )

    @property
    def all(self) -> Mapping[str, str]:
        """Each table or view, and its name for SQL."""
        return {name: getattr(self, name) for name in RELATIONS}

    def sql(self, name: str, **pieces: str) -> str:
        """A statement for these tables; it is put together once.

        Args:
            name: `subject.name`, as in the files of `queries/`.
            pieces: Text that takes the place of pieces of that name.
        """
        key = (name, *itertools.chain.from_iterable(pieces.items()))
        found = self._texts.get(key)
        if found is None:
            found = catalog().render(name, _Names(self), pieces)
            if self._location.found:
                self._texts[key] = found
        return found

    def migration(self, text: str) -> str:
        """A migration's text for these tables."""
        functions = {function: getattr(self, function) for function in FUNCTIONS}
        indexes = {index: quote_name(f'{self.appname}{index}') for index in INDEXES}
        return fill(text, {**self.all, **functions, **indexes, 'schema': quote_name(self.schema)})

    @property
    def functions(self) -> Mapping[str, str]:
        """Each function, and the types of its arguments."""
        return FUNCTIONS

    def refresh(self, config: CoordinationConfig, cursor: Any) -> None:
        """Look again where the tables are, after they have been created."""

        def run(sql: str, params: Sequence[object]) -> Sequence[Sequence[Any]]:
            cursor.execute(sql, params)
            return list(cursor.fetchall())

        locate(self._location, config, run)


class _Names(Mapping[str, str]):
    """Names for SQL, `schema` among them, each made when it is asked for: where the tables have no
    place, statements that name none still work.
    """

    def __init__(self, tables: Tables) -> None:
        self._tables = tables

    def __contains__(self, name: object) -> bool:
        return name == 'schema' or name in RELATIONS or name in FUNCTIONS

    def __getitem__(self, name: str) -> str:
        if name == 'schema':
            return quote_name(self._tables.schema)
        found: str = getattr(self._tables, name)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(('schema', *RELATIONS, *FUNCTIONS))

    def __len__(self) -> int:
        return 1 + len(RELATIONS) + len(FUNCTIONS)


def quote_name(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
