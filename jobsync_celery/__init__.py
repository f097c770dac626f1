"""JobSync for Celery: an app's workers become nodes, and its keyed tasks run once, on the node that
owns them.
"""

try:
    import celery  # noqa: F401
    import click  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f'jobsync_celery: {error.name} is missing; install it with: pip install '
        "'jobsync-workers[celery]'",
        name=error.name,
    ) from error

from jobsync_core.ledger.execution import current_execution

from .plugin import JobSync
from .signals import rebalanced, released
from .tasks.once import exactly_once

__all__ = ['JobSync', 'current_execution', 'exactly_once', 'rebalanced', 'released']
