"""JobSync's core: processes that share work through PostgreSQL, each task on one of them."""
from .config import CoordinationConfig
from .effects import RebalanceEvent
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
    SchemaConflict,
    StoreTimeout,
    Unroutable,
)
from .job import Job
from .ledger import Execution, current_execution
from .once import exactly_once
from .task import Task
from .tokens import TokenSet

__version__ = '0.1.0'

__all__ = [
    'ClaimLost', 'ClusterNotFormed', 'CompletedAlready', 'ConfigMismatch', 'ConfigurationError', 'CoordinationConfig', 'DatabaseRefused',
    'DatabaseUnavailable', 'DuplicateExecution', 'DuplicateNodeName', 'Execution', 'ExecutionRunning', 'Fenced', 'InvalidTaskId', 'Job',
    'JobSyncError', 'MessageRefused', 'NotCommitted', 'NotEntered', 'RebalanceEvent', 'SchemaConflict', 'StoreTimeout', 'Task', 'TokenSet',
    'Unroutable',
    'current_execution', 'exactly_once',
]
