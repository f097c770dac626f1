"""What an app's settings say of its cluster, its broker and its tasks: made at the first use, in a
producer as in a worker.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from jobsync_core.config import CoordinationConfig

from .broker.broker import CeleryBroker
from .broker.counting import CeleryCounter
from .broker.forwarding import Forwarder
from .broker.queues import Queues, driver_of
from .broker.rabbit import RabbitBroker
from .settings import CelerySettings, read_settings
from .tasks.coordinated import Tasks

if TYPE_CHECKING:
    from celery import Celery
    from kombu.connection import Connection

    from .redis.carried_over import CarriedOver

__all__ = ['Application', 'read_config']

_NAME = '_jobsync_application'


class Application:
    """An app, and what its settings say.

    Args:
        app: The app.
        given: What `JobSync(app, …)` was called with.
    """

    def __init__(self, app: Celery, given: Mapping[str, Any]) -> None:
        self.app = app
        self._given = given
        self._settings: CelerySettings | None = None
        self._tasks: Tasks | None = None
        self._driver: str | None = None
        self._queues: Queues | None = None
        vars(app)[_NAME] = self

    @staticmethod
    def of(app: Any) -> Application | None:
        """That of an app; None where it has no plugin."""
        found: Application | None = vars(_plain(app)).get(_NAME)
        return found

    @property
    def name(self) -> str:
        """What Celery takes for the application's name; '' where it has none."""
        main = self.app.main
        return main if isinstance(main, str) and main != '__main__' else ''

    @property
    def settings(self) -> CelerySettings:
        """The settings; read at the first use.

        Raises:
            ConfigurationError: A setting cannot work.
        """
        if self._settings is None:
            self._settings = read_settings(self.app, self._given)
        return self._settings

    def read_again(self, **more: Any) -> CelerySettings:
        """Read the settings again, with what a worker's command line says.

        Raises:
            ConfigurationError: A setting cannot work.
        """
        self._settings = read_settings(self.app, {**self._given, **more})
        self._tasks = self._queues = None  # they were made from the former ones
        return self._settings

    @property
    def tasks(self) -> Tasks:
        """The app's coordinated tasks."""
        if self._tasks is None:
            self._tasks = Tasks(self.app, self.settings)
        return self._tasks

    @property
    def driver(self) -> str:
        """The broker's kind."""
        if self._driver is None:
            self._driver = driver_of(self.app)
        return self._driver

    @property
    def queues(self) -> Queues:
        """The cluster's queues."""
        if self._queues is None:
            self._queues = Queues(self.app, self.driver, self.settings.config.appname)
        return self._queues

    def forwarder(self, patient: bool = True) -> Forwarder:
        """Who passes messages on; see Forwarder."""
        if self.driver == 'redis':
            from .redis.forwarding import RedisForwarder

            return RedisForwarder(self.app, self.queues, patient)
        return Forwarder(self.app, self.queues, patient)

    def broker(
        self,
        carried: CarriedOver | None = None,
        receiving: Callable[[Connection], Connection] = lambda connection: connection,
    ) -> CeleryBroker:
        """The broker.

        Args:
            carried: What this node's lost connections to Redis left.
            receiving: Lets a connection to Redis take messages without losing one.
        """
        forwarder, route_of = self.forwarder(), self.tasks.route_of
        if self.driver == 'redis':
            from .redis.broker import RedisBroker  # RabbitMQ needs no redis-py

            return RedisBroker(self.app, self.queues, forwarder, route_of, carried, receiving)
        kind = RabbitBroker if self.driver == 'amqp' else CeleryBroker
        return kind(self.app, self.queues, forwarder, route_of)

    def counter(self) -> CeleryCounter:
        """Who counts what waits at the broker."""
        if self.driver == 'redis':
            from .redis.counting import RedisCounter

            return RedisCounter(self.app, self.queues)
        return CeleryCounter(self.app, self.queues)


def _plain(app: Any) -> Any:
    """An app, where a proxy of it may be given."""
    return app._get_current_object() if hasattr(app, '_get_current_object') else app


def read_config(app: Celery) -> CoordinationConfig:
    """The cluster that an app's plugin works with; for commands and beat.

    Raises:
        ConfigurationError: A setting cannot work.
    """
    found = Application.of(app)
    return (found.settings if found is not None else read_settings(app)).config
