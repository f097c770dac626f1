"""Django's settings, as few as there can be."""

from __future__ import annotations

import os
from urllib.parse import unquote, urlsplit

DATABASE_URL = os.environ.get(
    'JOBSYNC_DATABASE_URL', 'postgresql://postgres:postgres@localhost/billing'
)
_url = urlsplit(DATABASE_URL)

SECRET_KEY = os.environ.get('SECRET_KEY', 'an example has no secrets')
USE_TZ = True
DEFAULT_AUTO_FIELD = 'django.db.models.BigAutoField'
INSTALLED_APPS = ['payments']
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

CELERY_BROKER_URL = os.environ.get('CELERY_BROKER_URL', 'redis://localhost:6379/0')
CELERY_RESULT_BACKEND = os.environ.get('CELERY_RESULT_BACKEND', CELERY_BROKER_URL)
# The same database as Django's: only then can one transaction hold both.
CELERY_JOBSYNC = {'database_url': DATABASE_URL, 'appname': 'billing_'}
