"""JobSync for Celery: an app's workers become nodes, and its keyed tasks run once, on the node that
owns them.
"""

from jobsync_core.ledger.execution import current_execution

from .plugin import JobSync
from .signals import rebalanced, released
from .tasks.once import exactly_once

__all__ = ['JobSync', 'current_execution', 'exactly_once', 'rebalanced', 'released']
