"""The Celery app of the project."""

from __future__ import annotations

import os

from celery import Celery

from jobsync_celery import JobSync

os.environ.setdefault('DJANGO_SETTINGS_MODULE', 'billing.settings')

app = Celery('billing')
app.config_from_object('django.conf:settings', namespace='CELERY')
app.autodiscover_tasks()
JobSync(app)
