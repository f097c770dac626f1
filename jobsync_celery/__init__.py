"""JobSync for Celery: an app's workers become nodes, and its keyed tasks run once, on the node that
owns them.
"""

from jobsync_core.ledger.execution import current_execution

from .once import exactly_once
from .plugin import JobSync, rebalanced, released

__all__ = ['JobSync', 'current_execution', 'exactly_once', 'rebalanced', 'released']
