"""What a Job answers, for annotations: dicts with known keys.

`job.nodes` and the others are plain dicts; these types name their keys and what stands there.
"""

from __future__ import annotations

import datetime
from typing import Any, TypedDict

__all__ = [
    'AuditedTask',
    'CoordinationStatus',
    'ExecutionDetails',
    'ExecutionInfo',
    'Explanation',
    'FormerAttempt',
    'LockInfo',
    'NodeEvent',
    'NodeInfo',
    'RecordedExecution',
    'TaskAudit',
    'TaskClaim',
]


class AuditedTask(TypedDict):
    """One of `Job.get_audit()`: a node has finished a task."""

    node: str
    task_id: str


class LockInfo(TypedDict):
    """One of `Job.list_locks()`: a task that is pinned to nodes.

    `node_patterns` are SQL LIKE patterns, the preferred one first; `created_by` is a node's name;
    `expires_at` is None where the lock does not end; `queue` is the queue group in which it counts,
    None where it counts in all.
    """

    task_id: str
    node_patterns: list[str]
    reason: str | None
    created_at: datetime.datetime
    created_by: str | None
    expires_at: datetime.datetime | None
    queue: str | None


class _NodeName(TypedDict):
    name: str


class NodeInfo(_NodeName, total=False):
    """One of `Job.nodes` and `Job.get_active_nodes()`; in single-node mode there is only `name`.

    `state` is 'joining', 'active' or 'draining'; `tokens` counts those that it owns, `leaving`
    those of them that are to be handed over; `age_sec` is the seconds since its last heartbeat;
    `incarnation` and `beat` tell this life of the node, and how often its heart has beaten;
    `groups` names the queue groups that it belongs to, besides that of the plain Job, of which all
    counts here are; `silent` tells that it has not reached its broker for a while.
    """

    created_on: datetime.datetime
    last_heartbeat: datetime.datetime
    age_sec: float
    alive: bool
    is_leader: bool
    state: str
    weight: float
    tokens: int
    leaving: int
    incarnation: str
    beat: int
    lease_sec: float
    host: str | None
    pid: int | None
    groups: list[str]
    silent: bool


class NodeEvent(TypedDict):
    """One of the `recent_events` of a node."""

    type: str
    timestamp: datetime.datetime
    data: dict[str, Any]


class _CoordinationEnabled(TypedDict):
    coordination_enabled: bool


class CoordinationStatus(_CoordinationEnabled, total=False):
    """What `Job.get_coordination_status()` and `Job.local_status()` tell; in single-node mode there
    is only `coordination_enabled`.

    `state` is the node's while it is entered ('joining', 'active', 'draining', …), otherwise the
    Job's; `active_nodes`, which `local_status` does not tell, is None where the database cannot be
    asked; `executions_unsettled` counts attempts that wait for the database to record their end.
    """

    node_name: str
    incarnation: str
    state: str
    is_leader: bool
    healthy: bool
    active_nodes: int | None
    my_tokens: int
    groups: dict[str, int]
    token_version: int
    total_tokens: int
    last_heartbeat: datetime.datetime | None
    lease_remaining_sec: float
    evictions: int
    callback_failures: int
    callbacks_slow: int
    executions_unsettled: int
    recent_events: list[NodeEvent]


class ExecutionInfo(TypedDict):
    """What the ledger knows of a key: `state` is 'running', 'lost', 'done', 'failed' or 'dead'.
    What is lost was running on a node that is gone: whoever gets its message takes it over. What is
    dead was lost too often, and is not begun any more.
    """

    key: str
    state: str
    node: str | None
    attempts: int
    started_at: datetime.datetime
    finished_at: datetime.datetime | None
    error: str | None


class RecordedExecution(TypedDict):
    """One row of the ledger, as operators see it; `state` as in ExecutionInfo.

    `node`, `host` and `pid` tell who made the last attempt, `fence` is the number of that attempt,
    which rises with each of the key, `attempts` counts them, and `lost` those of them whose process
    died or was taken for dead; `expires_at` is when the row goes,
    None while it stays. A time is None as well where it is none that Python has.
    """

    key: str
    state: str
    node: str | None
    attempts: int
    fence: int
    host: str | None
    pid: int | None
    started_at: datetime.datetime | None
    finished_at: datetime.datetime | None
    expires_at: datetime.datetime | None
    error: str | None
    lost: int


class FormerAttempt(TypedDict):
    """An attempt at a key that did not complete it: `outcome` is 'failed' or 'lost'; `number`
    counts from 1.
    """

    number: int
    outcome: str
    node: str | None
    host: str | None
    pid: int | None
    fence: int
    started_at: datetime.datetime | None
    ended_at: datetime.datetime | None
    error: str | None


class ExecutionDetails(RecordedExecution):
    """The same with what is told of one key alone: its `result` as the JSON text that is stored,
    of one that is running, for how many seconds its node has been silent, and in `history` the
    attempts that failed or were lost, in their order: the last hundred. `message` is the message of
    a dead key as JSON text, where nobody but the ledger keeps it.
    """

    result: str | None
    message: str | None
    silent_sec: float | None
    history: list[FormerAttempt]


class TaskAudit(TypedDict):
    """A node has finished a task for a date: `counts` tells whether that still counts, `lives`
    whether there is any node.
    """

    node: str
    date: datetime.date
    created_on: datetime.datetime
    counts: bool
    lives: bool


class TaskClaim(TypedDict):
    """A live node has taken a task for a date; `promised`: a hand-over recorded it, as the node may
    be at it.
    """

    node: str
    date: datetime.date
    created_on: datetime.datetime
    promised: bool


class _Owner(TypedDict):
    task_id: str
    token: int
    owner: str | None


class Explanation(_Owner, total=False):
    """What `Job.explain()` tells: who owns a task and why; in single-node mode there are only
    `task_id`, `token` and `owner`.

    `pattern` is the one of the lock that decides with the present nodes; `others` are further
    locked tasks on the same token; `next` would own it if the owner went; `owner_silent_sec` is
    there where the owner missed its lease; `ledger` is the row of a key of that text.
    """

    since: datetime.datetime | None
    version: int | None
    blocked: bool
    moving_to: str | None
    lock: LockInfo | None
    pattern: str | None
    ledger: ExecutionInfo | None
    owner_silent_sec: float | None
    others: list[str]
    next: str | None
    audit: TaskAudit | None
    claim: TaskClaim | None
