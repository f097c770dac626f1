"""A project that books payments once each."""

from .celery import app

__all__ = ['app']
