"""What was sent, what ran, and whether the two agree.

Workers append one line per event to a file with a single write each: what was written survives
SIGKILL, needs no server that a test may have taken away, and can be read meanwhile. Effects are
rows that the tasks write in the transaction that carries their completion: the proof that a key
completed once and no more.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobsync_core import CoordinationConfig
from jobsync_core.assignment.hashing import task_to_token
from tests.support.cluster import query

__all__ = ['EFFECTS', 'Ledger', 'Note', 'Notes', 'Sent', 'check', 'moment']

#: Table of what the tasks do in their completion's transaction. It has no unique constraint: a
#: second effect must be seen.
EFFECTS = (
    'CREATE TABLE effect (key text NOT NULL, message text NOT NULL, node text NOT NULL, pid '
    'integer NOT NULL)'
)
#: Keys of tasks that are not exactly-once.
_WITHOUT_LEDGER = ('p:', 'r:', 'g:')


def moment() -> float:
    """The time of notes, comparable between the processes of one machine."""
    return time.monotonic()


@dataclass(frozen=True)
class Note:
    """Something that a task did.

    Attributes:
        event: 'start', 'end', or 'error'.
        key: What the task worked on, such as 'k:17'.
        message: The message's id.
        node: The worker's name.
        pid: The process.
        at: When, by `moment`.
        more: Whatever the task wants to tell.
    """

    event: str
    key: str
    message: str
    node: str
    pid: int
    at: float
    more: Any = None


class Notes:
    """The file of notes."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, event: str, key: str, message: str, node: str, more: Any = None) -> None:
        """Append a note of this process."""
        line = json.dumps([event, key, message, node, os.getpid(), moment(), more]) + '\n'
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(file, line.encode())
        finally:
            os.close(file)

    def read(self) -> list[Note]:
        """All notes so far, in order."""
        if not self.path.exists():
            return []
        return [
            Note(*json.loads(line))
            for line in self.path.read_text().splitlines(keepends=True)
            if line.endswith('\n')
        ]

    def of(self, event: str, keys: Iterable[str] | None = None) -> list[Note]:
        """Notes of one event, about certain keys if given."""
        wanted = None if keys is None else set(keys)
        return [
            note
            for note in self.read()
            if note.event == event and (wanted is None or note.key in wanted)
        ]


@dataclass(frozen=True)
class Sent:
    """A message that was sent.

    Attributes:
        id: Its id.
        key: What its task works on.
        fate: What is to become of it: 'done', 'failed' (its task raises), or 'dropped' (revoked, or
            expired on the way).
    """

    id: str
    key: str
    fate: str = 'done'


@dataclass
class Ledger:
    """Tables of a cluster, read."""

    config: CoordinationConfig

    def states(self) -> dict[str, str]:
        """State of each key, without its scope: a scope has no colon, and the ids of messages,
        which have no scope, have none either.
        """
        found: dict[str, str] = {}
        for key, state in query(self.config, 'SELECT key, state FROM "{}execution"'):
            inner = key.partition(':')[2] or key
            # Two tasks that worked on one number would hide each other.
            assert inner not in found, f'two scopes have the key {inner!r}'
            found[inner] = state
        return found

    def effects(self) -> list[tuple[str, str, str]]:
        """Key, message and node of each effect."""
        return [
            (key, message, node)
            for key, message, node in query(self.config, 'SELECT key, message, node FROM effect')
        ]

    def owners(self, keys: Iterable[str]) -> dict[str, str | None]:
        """Who owns each key now."""
        ranges = query(self.config, 'SELECT lower(tokens), upper(tokens), node FROM "{}assignment"')
        found: dict[str, str | None] = {}
        for key in keys:
            token = task_to_token(key, self.config.total_tokens, self.config.hash_function)
            found[key] = next((node for low, high, node in ranges if low <= token < high), None)
        return found

    def owned(self) -> dict[str, int]:
        """Number of tokens by owner, for the nodes that own any."""
        owned: Counter[str] = Counter()
        for low, high, node in query(
            self.config,
            'SELECT lower(tokens), upper(tokens), node FROM "{}assignment" WHERE node IS NOT NULL',
        ):
            owned[node] += high - low
        return dict(owned)

    def blocked(self) -> int:
        """Number of tokens that nobody may own at present."""
        found = query(
            self.config,
            'SELECT coalesce(sum(upper(tokens) - lower(tokens)), 0) FROM "{}assignment" WHERE '
            'node IS NULL AND blocked',
        )
        return int(found[0][0])

    def incarnations(self) -> dict[str, str]:
        """The life of each node: another one means that the node was evicted, or started anew."""
        # The tables come with the first node.
        with contextlib.suppress(Exception):
            return dict(query(self.config, 'SELECT name, incarnation FROM "{}node"'))
        return {}

    def node_queues(self) -> dict[str, str | None]:
        """Recorded node queues and their nodes."""
        found = 'SELECT name, node FROM "{}queue" UNION SELECT name, node FROM "{}node_queue"'
        return dict(query(self.config, f"SELECT name, node FROM ({found}) q WHERE name <> ''"))


def check(sent: Sequence[Sent], notes: Notes, ledger: Ledger, coordinated: bool = True) -> str:
    """Compare what was sent with what happened: published = completed once + failed + dropped.

    Args:
        sent: All messages that were sent; those with one key count as one.
        notes: What the tasks noted.
        ledger: Their cluster.
        coordinated: False where JobSync was left out: then there is no ledger to look into.

    Returns:
        A line for the log.

    Raises:
        AssertionError: Something was lost, came twice, or ran though it should not.
    """
    fates: dict[str, set[str]] = {}
    for item in sent:
        fates.setdefault(item.key, set()).add(item.fate)
    done = {key for key, found in fates.items() if 'done' in found}
    failed = {key for key, found in fates.items() if found == {'failed'}}
    dropped = {key for key, found in fates.items() if found == {'dropped'}}
    everything = notes.read()
    ended = {note.key for note in everything if note.event == 'end'}
    assert not done - ended, (
        f'{len(done - ended)} of {len(done)} keys never ran to their end: '
        f'{sorted(done - ended)[:10]}'
    )
    ran = {note.key for note in everything if note.event == 'start' and note.key in dropped}
    assert not ran, f'revoked or expired, and ran all the same: {sorted(ran)[:10]}'
    effects = Counter(key for key, _, _ in ledger.effects())
    twice = {key: count for key, count in effects.items() if count > 1}
    assert not twice, f'completed more than once: {twice}'
    transactional = {key for key in done if key.startswith(('k:', 'l:', 'h:'))}
    assert not transactional - set(effects), (
        f'without an effect: {sorted(transactional - set(effects))[:10]}'
    )
    if coordinated:
        states = ledger.states()
        for item in sent:
            if item.key.startswith('i:'):
                states[item.key] = states.get(item.id, '')
        wrong = {
            key: states.get(key)
            for key in done
            if not key.startswith(_WITHOUT_LEDGER) and states.get(key) != 'done'
        }
        assert not wrong, f'not completed in the ledger: {dict(list(wrong.items())[:10])}'
        recorded = {key: states[key] for key in (failed | dropped) if states.get(key) == 'done'}
        assert not recorded, f'completed though they should not: {recorded}'
    starts = Counter(note.key for note in everything if note.event == 'start')
    again = sum(count - 1 for key, count in starts.items() if key in done)
    return (
        f'{len(fates)} keys: {len(done)} completed once, {len(failed)} failed, {len(dropped)} '
        'expired or revoked; '
        f'{again} attempts were repeated'
    )
