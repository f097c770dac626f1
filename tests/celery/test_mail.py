"""Node queues on RabbitMQ: what is declared, and where a message goes whose queue has gone."""
from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
from celery import Celery, signals

from jobsync_celery import JobSync
from jobsync_celery.mail import CeleryMail, exchange_of
from jobsync_core.config import CoordinationConfig

from ..brokers import RabbitServer
from ..waiting import eventually

_QUEUE, _PARKED = 'jobsync.shop_.n1', 'jobsync.shop_.parked'


@pytest.fixture
def space(rabbitmq_server: RabbitServer) -> Iterator[str]:
    name = rabbitmq_server.new_space()
    yield name
    rabbitmq_server.drop_space(name)


@pytest.mark.parametrize('priorities', [None, 10])
def test_queues_are_declared_alike_each_time_and_strays_are_parked(
    rabbitmq_server: RabbitServer, space: str, priorities: int | None,
) -> None:
    app = Celery('declaring', broker=rabbitmq_server.url(space), set_as_current=False)
    app.conf.task_queue_max_priority = priorities
    plugin = JobSync(app, config=CoordinationConfig(appname='shop_'), route_producers=False)
    mail = CeleryMail(plugin)
    with contextlib.ExitStack() as stack:
        stack.callback(signals.before_task_publish.disconnect, plugin._before_publish)
        stack.callback(mail.close)
        mail.declare(_QUEUE)
        mail.declare(_QUEUE)
        arguments = {} if priorities is None else {'x-max-priority': priorities}
        found = {item['name']: item['arguments'] for item in rabbitmq_server.api('GET', f'queues/{space}?disable_stats=true')}
        assert found == {_QUEUE: arguments, _PARKED: arguments}
        with app.connection_for_write(transport_options={'confirm_publish': True}) as connection:
            producer = connection.Producer()
            for queue in (_QUEUE, 'jobsync.shop_.gone'):
                producer.publish({}, exchange=exchange_of(plugin).name, routing_key=queue, retry=False)
        eventually(lambda: rabbitmq_server.depths(space) == {_QUEUE: 1, _PARKED: 1})
