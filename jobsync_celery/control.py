"""`celery -A proj inspect jobsync`: each worker as it sees itself."""

from __future__ import annotations

from typing import Any

from celery.worker.control import inspect_command

__all__ = ['jobsync']


@inspect_command()  # type: ignore[untyped-decorator]  # celery has no types
def jobsync(state: Any) -> dict[str, Any]:
    """Show the JobSync node of each worker: lease, tokens, messages."""
    from .plugin import JobSync

    plugin = JobSync.of(state.app)
    return (
        plugin.local_status()
        if plugin is not None
        else {'error': 'this worker has no JobSync: call JobSync(app)'}
    )
