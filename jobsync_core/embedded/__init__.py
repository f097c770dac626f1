"""Servers of one's own, from wheels: for tests and demonstrations."""

from __future__ import annotations

from .errors import EmbeddedServerError
from .postgres import EmbeddedPostgres
from .redis import EmbeddedRedis

__all__ = ['EmbeddedPostgres', 'EmbeddedRedis', 'EmbeddedServerError']
