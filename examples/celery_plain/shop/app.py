"""The Celery app."""

from __future__ import annotations

from celery import Celery

from jobsync_celery import JobSync

app = Celery('shop', include=['shop.tasks'])
app.config_from_object('shop.settings')
JobSync(app)  # the database comes from JOBSYNC_DATABASE_URL
