"""A node's own settings of Celery, put into its app for as long as it is a node."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from .application import Application
from .redis.keys import VISIBILITY_SEC, node_options

__all__ = ['NodeConfiguration']

#: Least seconds that Redis may take to answer a worker.
_ANSWER_SEC = 5.0
#: Celery's own default, in seconds: whoever wants just that gives 121.
_DEFAULT_BROKER_HEARTBEAT = 120
#: RabbitMQ sends one in half of this. Celery's mingle ends when nothing has come for a second: with
#: a heartbeat in each second it goes on until RabbitMQ, to which the worker sends none meanwhile,
#: closes the connection.
_LEAST_BROKER_HEARTBEAT_SEC = 3
_CHANGED = ('broker_transport_options', 'broker_heartbeat')


class NodeConfiguration:
    """Changes an app's configuration when it is made.

    Args:
        application: The app.
        node: The node's name.
        solo: Tasks run in the event loop.
    """

    def __init__(self, application: Application, node: str, solo: bool) -> None:
        self._conf = conf = application.app.conf
        # What the app was configured with before.
        self._plain: dict[str, Any] = {name: conf[name] for name in _CHANGED}
        config = application.settings.config
        if application.driver == 'redis':
            # kombu waits for an answer for ever, in the event loop; but a router may have forgotten
            # the connection.
            conf.broker_transport_options = {
                'visibility_timeout': VISIBILITY_SEC,
                'socket_timeout': max(_ANSWER_SEC, config.heartbeat_timeout_sec),
                **(conf.broker_transport_options or {}),
                **node_options(config.appname, node),
            }
        if (
            application.driver == 'amqp'
            and conf.broker_heartbeat == _DEFAULT_BROKER_HEARTBEAT
            and not solo
        ):
            # So that RabbitMQ takes back what a stopped or unreachable worker holds; a solo worker
            # sends none while a task runs.
            conf.broker_heartbeat = max(
                _LEAST_BROKER_HEARTBEAT_SEC, math.ceil(config.heartbeat_timeout_sec)
            )

    @property
    def plain_options(self) -> Mapping[str, Any]:
        """The app's own transport options: those of workers without the plugin."""
        return self._plain['broker_transport_options'] or {}

    def undo(self) -> None:
        """Configure the app as it was."""
        self._conf.update(self._plain)
