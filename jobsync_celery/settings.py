"""Where the plugin's settings come from: `JobSync(app, …)`, then `app.conf.jobsync_…` and
`app.conf.jobsync`, then the environment.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import ModuleType
from typing import TYPE_CHECKING, Any

from jobsync_core.config import CoordinationConfig
from jobsync_core.errors import ConfigurationError
from jobsync_core.worker.settings import PluginSettings, combined

if TYPE_CHECKING:
    from celery import Celery

__all__ = ['CelerySettings', 'read_settings']


@dataclass(frozen=True, kw_only=True)
class CelerySettings(PluginSettings):
    """Settings of Celery's plugin.

    Args:
        redis_atomic: False: messages are received from Redis in kombu's way, which takes a message
            off its list before it is recorded.
    """

    redis_atomic: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.redis_atomic, bool):
            raise ConfigurationError(f'redis_atomic={self.redis_atomic!r}: give True or False')


_PREFIX = 'jobsync_'
_NAMES = (
    'database_url',
    *(item.name for item in (*fields(CelerySettings), *fields(CoordinationConfig))),
)


def read_settings(app: Celery, given: Mapping[str, Any] | None = None) -> CelerySettings:
    """The plugin's settings for an app.

    Args:
        app: The app; its configuration is read now.
        given: What `JobSync(app, …)` was called with; wins over the rest.

    Raises:
        ConfigurationError: A setting cannot work; the message names it and the remedy.
    """
    conf = app.conf
    group = conf.get('jobsync') or {}
    if not isinstance(group, Mapping):
        raise ConfigurationError(
            f"app.conf.jobsync is a {type(group).__name__}: give a dict such as {{'database_url': "
            "'postgresql://…'}"
        )
    single = {name: conf.get(f'jobsync_{name}') for name in _NAMES}
    _check_names(app)
    configuration = {
        **group,
        **{name: value for name, value in single.items() if value is not None},
    }
    return CelerySettings.read(combined(configuration, given or {}))


def _check_names(app: Celery) -> None:
    """Refuse what begins with jobsync_ in the app's configuration and is no setting. The
    configuration has been loaded.
    """
    conf = app.conf
    prefix = getattr(conf, 'prefix', None) or ''  # of the namespace, CELERY_
    for written in list(conf):
        name = str(written)
        if prefix and name.startswith(prefix):
            name = name.removeprefix(prefix).lower()
        short = name.removeprefix(_PREFIX)
        if short == name or short in _NAMES:
            continue
        near = difflib.get_close_matches(short, _NAMES, 1)
        if isinstance(conf[written], (ModuleType, type)) or (callable(conf[written]) and not near):
            continue  # a module of settings holds what it imports, too
        meant = (
            written[: len(written) - len(short)]
            + (near[0].upper() if written.isupper() else near[0])
            if near
            else ''
        )
        raise ConfigurationError(
            f'app.conf has {written!r}, which is no setting of JobSync'
            + (
                f': did you mean {meant!r}?'
                if near
                else f': remove it; the settings are {", ".join(_NAMES)}'
            )
        )
