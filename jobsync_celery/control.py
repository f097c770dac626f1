"""`celery -A proj inspect jobsync`: each worker as it sees itself."""

from __future__ import annotations

from typing import Any

from celery.worker.control import inspect_command

from .hooks import WorkerHooks

__all__ = ['jobsync']


@inspect_command()  # type: ignore[untyped-decorator]  # celery has no types
def jobsync(state: Any) -> dict[str, Any]:
    """Show the JobSync node of each worker: lease, tokens, messages."""
    hooks = WorkerHooks.of(state.app)
    return (
        hooks.local_status()
        if hooks is not None
        else {'error': 'this worker has no JobSync: call JobSync(app)'}
    )
