"""Loggers below Celery's own, whose records stay on one line."""

from __future__ import annotations

import logging

from celery.utils import log

from jobsync_core.logs import escaping

__all__ = ['get_logger']


def get_logger(name: str) -> logging.Logger:
    """The logger of a module of this package.

    Args:
        name: The module's `__name__`.
    """
    logger: logging.Logger = log.get_logger(name)
    return escaping(logger)
