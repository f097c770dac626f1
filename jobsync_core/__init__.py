"""JobSync's core: processes that share work through PostgreSQL, each task on one of them."""

from .assignment.tokens import TokenSet
from .config import CoordinationConfig
from .errors import (
    ClaimLost,
    ClusterNotFormed,
    CompletedAlready,
    ConfigMismatch,
    ConfigurationError,
    DatabaseRefused,
    DatabaseUnavailable,
    DuplicateExecution,
    DuplicateNodeName,
    ExecutionRunning,
    Fenced,
    InvalidTaskId,
    JobSyncError,
    MessageRefused,
    NotCommitted,
    NotEntered,
    ResultLost,
    SchemaConflict,
    StoreTimeout,
    Unroutable,
)
from .job import Job
from .ledger.execution import Execution, current_execution
from .ledger.once import exactly_once
from .protocol.effects import RebalanceEvent
from .task import Task

__version__ = '0.2.0.dev0'

__all__ = [
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
]
