"""What the plugin uses of Dramatiq, pika and redis-py that is not promised to stay: checked when a
worker starts, and by a test.

docs/DRAMATIQ.md has the same table, for people. Dramatiq's names of keys at Redis stand in
`broker/redis_keys.py`, and are compared with its script by a test.
"""

from __future__ import annotations

from jobsync_core.worker.parts import Part

__all__ = ['GATE', 'GROUPS', 'PARTS', 'RABBITMQ', 'REDIS', 'SENDING']

SENDING, GATE, GROUPS = 'sending', 'the gate', 'groups'
REDIS, RABBITMQ = 'Redis', 'RabbitMQ'

PARTS: tuple[Part, ...] = (
    Part(SENDING, 'dramatiq.broker:Broker', ('enqueue', 'middleware', 'actors')),
    Part(GATE, 'dramatiq.broker:Broker', ('consume', 'emit_before', 'emit_after', 'queues')),
    Part(GATE, 'dramatiq.broker:MessageProxy', ('_message', 'failed', 'fail')),
    Part(
        GATE,
        'dramatiq.worker:Worker',
        ('consumers', 'consumer_whitelist', 'worker_timeout', 'stop'),
    ),
    Part(GATE, 'dramatiq.worker:_ConsumerThread', ('consumer',)),
    Part(GROUPS, 'dramatiq.middleware:GroupCallbacks', ('rate_limiter_backend',)),
    Part(GROUPS, 'dramatiq.rate_limits:RateLimiterBackend', ('add', 'incr')),
    Part(
        REDIS,
        'dramatiq.brokers.redis:RedisBroker',
        (
            'client',
            'namespace',
            'broker_id',
            'maintenance_chance',
            'heartbeat_timeout',
            '__getattr__',
        ),
    ),
    Part(REDIS, 'redis:Redis', ('connection_pool', 'register_script')),
    Part(REDIS, 'redis:ConnectionPool', ('connection_class', 'connection_kwargs')),
    Part(
        REDIS,
        'redis.connection:Connection',
        ('connect', 'disconnect', 'send_command', 'read_response'),
    ),
    Part(REDIS, 'redis.commands.core:Script', ('sha', 'script')),
    Part(
        RABBITMQ,
        'dramatiq.brokers.rabbitmq:RabbitmqBroker',
        (
            'parameters',
            'connection',
            'channel',
            'confirm_delivery',
            'queues_pending',
            '_ensure_queue',
            '_build_queue_arguments',
            '_declare_xq_queue',
        ),
    ),
    Part(RABBITMQ, 'dramatiq.brokers.rabbitmq', ('DEAD_MESSAGE_TTL',)),
    Part(RABBITMQ, 'pika:BlockingConnection', ('_impl',)),
    Part(RABBITMQ, 'pika.adapters.blocking_connection:BlockingChannel', ('_closing_reason',)),
    Part(RABBITMQ, 'pika.connection:Connection', ('server_properties',)),
    Part(RABBITMQ, 'pika.adapters.utils.connection_workflow', ('AMQPConnectorException',)),
)
