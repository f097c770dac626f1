"""Django's settings, as few as there can be."""

from __future__ import annotations

import os
from urllib.parse import unquote, urlsplit

DATABASE_URL = os.environ.get(
    'JOBSYNC_DATABASE_URL', 'postgresql://postgres:postgres@localhost/billing'
)
BROKER_URL = os.environ.get('BROKER_URL', 'redis://localhost:6379/0')
_url = urlsplit(DATABASE_URL)

SECRET_KEY = os.environ.get('SECRET_KEY', 'an example has no secrets')
USE_TZ = True
DEFAULT_AUTO_FIELD = 'django.db.models.BigAutoField'
INSTALLED_APPS = ['django_dramatiq', 'payments']
DATABASES = {
    'default': {
        'ENGINE': 'django.db.backends.postgresql',
        'HOST': _url.hostname,
        'PORT': _url.port or 5432,
        'NAME': _url.path.lstrip('/'),
        'USER': unquote(_url.username or ''),
        'PASSWORD': unquote(_url.password or ''),
    }
}

DRAMATIQ_BROKER = {
    'BROKER': 'dramatiq.brokers.redis.RedisBroker',
    'OPTIONS': {'url': BROKER_URL},
    'MIDDLEWARE': [
        'jobsync_dramatiq.JobSync',
        'dramatiq.middleware.AgeLimit',
        'dramatiq.middleware.TimeLimit',
        'dramatiq.middleware.Callbacks',
        'dramatiq.middleware.Retries',
        'django_dramatiq.middleware.DbConnectionsMiddleware',
    ],
}
DRAMATIQ_RESULT_BACKEND = {
    'BACKEND': 'dramatiq.results.backends.redis.RedisBackend',
    'BACKEND_OPTIONS': {'url': BROKER_URL},
}
# The same database as Django's: only then can one transaction hold both.
DRAMATIQ_JOBSYNC = {'database_url': DATABASE_URL, 'appname': 'billing_'}
