"""The RabbitMQ that is newer than the machine's own is one."""

from __future__ import annotations

import pika

from tests.support.brokers import RabbitServer


def test_it_is_newer_and_knows_a_default_type(newer_rabbitmq: RabbitServer) -> None:
    version = newer_rabbitmq.api('GET', 'overview')['rabbitmq_version']
    assert tuple(map(int, version.split('.'))) >= (3, 12)
    space = newer_rabbitmq.new_space(default_queue_type='quorum')
    with pika.BlockingConnection(pika.URLParameters(newer_rabbitmq.url(space))) as connection:
        connection.channel().queue_declare('work', durable=True)
    assert newer_rabbitmq.api('GET', f'queues/{space}/work')['type'] == 'quorum'
    assert 'running_nodes' in newer_rabbitmq.control('cluster_status', '--formatter', 'json')
