"""A scheduler for `celery beat` without a single point of failure."""

from .scheduler import JobSyncScheduler

__all__ = ['JobSyncScheduler']
