"""Dramatiq plugin: every worker process is a node, and keyed messages run on the node that owns
their key.
"""

from jobsync_core.ledger.execution import current_execution

from .middleware import JobSync
from .once import exactly_once

__all__ = ['JobSync', 'current_execution', 'exactly_once']
