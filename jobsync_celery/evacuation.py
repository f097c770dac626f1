"""What `jobsync evacuate` asks of Celery's broker."""

from __future__ import annotations

import re
from collections.abc import Iterable

from .mail import CeleryMail

__all__ = ['CeleryEvacuation']

_SUFFIX = re.compile(r'\.unacked(_index|_mutex)?$')


class CeleryEvacuation(CeleryMail):
    """The broker of an app whose plugin is taken out."""

    kind = 'celery'

    def places(self) -> Iterable[str]:
        """See Evacuable. RabbitMQ cannot list queues; on Redis there may be some that no table
        knows of.
        """
        if self._plugin.driver != 'redis':
            return []
        channel = self._open()
        prefix, ours = channel.global_keyprefix, f'jobsync.{self._plugin.settings.config.appname}.'
        pattern = re.sub(r'([*?\[\]\\])', r'\\\1', f'{prefix}{ours}') + '*'
        with channel.conn_or_acquire() as client:
            found = [
                key.decode() if isinstance(key, bytes) else str(key)
                for key in client.scan_iter(match=pattern, count=1000)
            ]
        return sorted({_SUFFIX.sub('', key[len(prefix) :].split(channel.sep)[0]) for key in found})
