"""What users import, wherever it is made."""

from __future__ import annotations

import importlib

import pytest

_CORE = {
    'ClaimLost',
    'ClusterNotFormed',
    'CompletedAlready',
    'ConfigMismatch',
    'ConfigurationError',
    'CoordinationConfig',
    'DatabaseRefused',
    'DatabaseUnavailable',
    'DuplicateExecution',
    'DuplicateNodeName',
    'Execution',
    'ExecutionRunning',
    'Fenced',
    'InvalidTaskId',
    'Job',
    'JobSyncError',
    'MessageRefused',
    'NotCommitted',
    'NotEntered',
    'RebalanceEvent',
    'ResultLost',
    'SchemaConflict',
    'StoreTimeout',
    'Task',
    'TokenSet',
    'Unroutable',
    'current_execution',
    'exactly_once',
}
_NAMES = {
    'jobsync': _CORE,
    'jobsync_core': _CORE,
    'jobsync_core.embedded': {'EmbeddedPostgres', 'EmbeddedRedis', 'EmbeddedServerError'},
    'jobsync_core.executions': {
        'STATES',
        'ExecutionDetails',
        'ExecutionFilter',
        'Executions',
        'FormerAttempt',
        'NoSuchExecution',
        'RecordedExecution',
    },
    'jobsync_core.metrics': {'JobCollector'},
    'jobsync_core.results': {
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
    },
    'jobsync_core.testing': {'Cluster', 'FakeJob', 'MemoryLedger', 'standing_in'},
    'jobsync_celery': {'JobSync', 'current_execution', 'exactly_once', 'rebalanced', 'released'},
    'jobsync_celery.beat': {'JobSyncScheduler'},
    'jobsync_dramatiq': {'JobSync', 'current_execution', 'exactly_once'},
}


@pytest.mark.parametrize('module', _NAMES)
def test_public_names_stay_where_they_are(module: str) -> None:
    missing = {
        name for name in _NAMES[module] if not hasattr(importlib.import_module(module), name)
    }
    assert not missing


@pytest.mark.parametrize(
    'module', ['jobsync', 'jobsync_core', 'jobsync_celery', 'jobsync_dramatiq']
)
def test_nothing_else_is_public(module: str) -> None:
    assert set(importlib.import_module(module).__all__) == _NAMES[module]
