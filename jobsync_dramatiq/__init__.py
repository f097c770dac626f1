"""Dramatiq plugin: every worker process is a node, and keyed messages run on the node that owns
their key.
"""

try:
    import dramatiq  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f'jobsync_dramatiq: {error.name} is missing; install it with: pip install '
        "'jobsync-workers[dramatiq]'",
        name=error.name,
    ) from error

from jobsync_core.ledger.execution import current_execution

from .middleware import JobSync
from .once import exactly_once

__all__ = ['JobSync', 'current_execution', 'exactly_once']
