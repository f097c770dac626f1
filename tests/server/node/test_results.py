"""What a Job answers has the keys that its types name, and values of those types."""

from __future__ import annotations

import datetime
import types
import typing
from collections.abc import Mapping
from typing import Any

from jobsync_core import CoordinationConfig, Job, Task
from jobsync_core.results import (
    AuditedTask,
    CoordinationStatus,
    ExecutionInfo,
    Explanation,
    LockInfo,
    NodeEvent,
    NodeInfo,
    TaskAudit,
    TaskClaim,
)


def check(answer: Mapping[str, Any] | None, kind: Any) -> None:
    """Its keys are the type's, all of them, and so are the types of its values."""
    assert answer is not None
    hints = typing.get_type_hints(kind)
    assert set(answer) == set(hints)
    for key, hint in hints.items():
        choices = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        # Parts are dicts, and lists are told from other things without their items.
        plain = [
            dict if typing.is_typeddict(each) else typing.get_origin(each) or each
            for each in choices
        ]
        assert isinstance(answer[key], tuple(plain)), (key, answer[key], hint)


def test_of_a_node_of_a_cluster(config: CoordinationConfig) -> None:
    with Job('n1', config, wait_on_enter=0, date=datetime.date(2024, 5, 6)) as job:
        job.register_lock('t', 'n1', 'why', 2)
        job.add_task(Task('t'))
        with job.once('t'):
            pass
        check(job.get_coordination_status(), CoordinationStatus)
        for event in job.local_status()['recent_events']:
            check(event, NodeEvent)
        check(job.nodes[0], NodeInfo)
        check(job.get_active_nodes()[0], NodeInfo)
        check(job.list_locks()[0], LockInfo)
        claimed = job.explain('t')
        check(claimed['claim'], TaskClaim)
        job.write_audit()
        check(job.get_audit()[0], AuditedTask)
        found = job.explain('t')
        check(found, Explanation)
        check(found['lock'], LockInfo)
        check(found['ledger'], ExecutionInfo)
        check(found['audit'], TaskAudit)


def test_of_a_single_node() -> None:
    with Job('n1') as job:
        assert job.nodes == [{'name': 'n1'}]
        assert job.local_status() == {'coordination_enabled': False}
        assert set(job.explain('t')) == {'task_id', 'token', 'owner'}
