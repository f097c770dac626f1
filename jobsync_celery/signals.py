"""Celery signals that a node of a cluster sends."""

from __future__ import annotations

from celery.utils.dispatch import Signal

__all__ = ['rebalanced', 'released']

#: Sent in a worker when its tokens have changed: arguments sender (the app) and event (a
#: RebalanceEvent).
rebalanced = Signal(name='jobsync_rebalanced', providing_args={'event'})
#: Sent in a worker before tokens go to another node: arguments sender (the app) and tokens (a
#: TokenSet).
released = Signal(name='jobsync_released', providing_args={'tokens'})
