"""What the plugin uses of Celery, kombu and redis-py that is not promised to stay: checked when a
worker starts, and by a test.

docs/CELERY.md has the same table, for people.
"""

from __future__ import annotations

from collections.abc import Iterable

from jobsync_core.errors import ConfigurationError
from jobsync_core.worker.parts import Part
from jobsync_core.worker.parts import missing as missing_of

from .logs import get_logger

__all__ = [
    'CLIENTS',
    'COLD',
    'GATE',
    'PASS_ON',
    'LIFE',
    'NEWER',
    'PARTS',
    'RECEIVE',
    'RESTORE',
    'SENDING',
    'Part',
    'check_parts',
    'missing',
]

logger = get_logger(__name__)

RECEIVE, PASS_ON, CLIENTS, RESTORE = (
    'receiving on Redis',
    'passing on on Redis',
    'keeping clients',
    'restoring on Redis',
)
GATE, LIFE, SENDING, COLD = 'the gate', "a worker's life", 'sending', 'cold shutdown'

_REDIS = 'kombu.transport.redis'
PARTS: tuple[Part, ...] = (
    Part(
        RECEIVE,
        f'{_REDIS}:Channel',
        (
            '_brpop_start',
            '_brpop_read',
            '_in_poll',
            '_queue_cycle',
            '_q_for_pri',
            'active_queues',
            'priority_steps',
            '_get',
            'conn_or_acquire',
            'global_keyprefix',
            'ack_emulation',
            'unacked_key',
            'unacked_index_key',
            'pool',
            'client',
            'handlers',
            'connection_errors',
            '_on_connection_disconnect',
            '_poll_error',
            'basic_consume',
            'basic_get',
        ),
    ),
    Part(
        RECEIVE, f'{_REDIS}:QoS', ('_remove_from_indices', 'append', 'ack', 'restore_unacked_once')
    ),
    Part(RECEIVE, 'kombu.transport.virtual:QoS', ('append', 'ack', 'can_consume')),
    Part(RECEIVE, f'{_REDIS}:Transport', ('cycle', '_deliver', 'register_with_event_loop')),
    Part(
        RECEIVE,
        f'{_REDIS}:MultiChannelPoller',
        ('_fd_to_chan', 'poller', 'eventflags', 'on_readable', 'fds'),
    ),
    Part(
        RECEIVE,
        'redis.connection:Connection',
        ('_sock', 'connect', 'disconnect', 'send_command', 'read_response'),
    ),
    Part(RECEIVE, 'redis:Redis', ('parse_response', 'execute_command', 'script_load')),
    Part(RECEIVE, 'kombu.connection:Connection', ('get_transport_cls',)),
    Part(
        PASS_ON,
        f'{_REDIS}:Channel',
        ('_q_for_pri', '_get_message_priority', 'conn_or_acquire', 'ack_emulation'),
    ),
    Part(PASS_ON, f'{_REDIS}:QoS', ('_remove_from_indices',)),
    Part(PASS_ON, 'kombu.transport.virtual:Message', ('_raw',)),
    Part(CLIENTS, f'{_REDIS}:Channel', ('_create_client', 'pool')),
    Part(CLIENTS, 'kombu.connection:ConnectionPool', ('new',)),
    Part(
        RESTORE,
        f'{_REDIS}:Channel',
        (
            'unacked_key',
            'global_keyprefix',
            'client',
            '_size',
            '_q_for_pri',
            'priority_steps',
            '_do_restore_message',
            '_lookup',
            'get_table',
            '_get_message_priority',
            'deadletter_queue',
            'conn_or_acquire',
        ),
    ),
    Part(
        RESTORE,
        f'{_REDIS}:QoS',
        ('restore_by_tag', 'restore_visible', '_remove_from_indices', '_on_collect'),
    ),
    Part(
        GATE,
        'celery.worker.consumer.consumer:Consumer',
        (
            'on_task_request',
            'strategies',
            'on_unknown_task',
            'timer',
            'call_soon',
            'connection_errors',
            'hub',
            'ensure_connected',
            'connection_for_read',
            'create_task_handler',
            'update_strategies',
            'on_decode_error',
            'on_invalid_task',
            'on_unknown_message',
            'channel_errors',
            'add_task_queue',
            'cancel_task_queue',
            'loop',
        ),
    ),
    Part(GATE, 'celery.worker.consumer.connection:Connection', ('connection',)),
    Part(
        GATE,
        'amqp.connection:Connection',
        ('bytes_recv', 'heartbeat', 'collect', 'server_properties', 'send_heartbeat'),
    ),
    Part(
        GATE,
        'celery.worker.state',
        ('reserved_requests', 'active_requests', 'task_ready', 'maybe_shutdown'),
    ),
    Part(
        GATE,
        'celery.worker.request:Request',
        (
            'acknowledge',
            'reject',
            'acknowledged',
            'message',
            'on_success',
            'on_failure',
            'on_timeout',
            'on_accepted',
            '_context',
        ),
    ),
    Part(GATE, 'celery.worker.worker:WorkController', ('_process_task', '_process_task_sem')),
    Part(GATE, 'celery.worker.components:Pool', ('_quick_release',)),
    Part(GATE, 'celery.concurrency.thread:TaskPool', ('executor',)),
    Part(GATE, 'billiard.pool:ApplyResult', ('_callback', '_accepted')),
    Part(GATE, 'billiard.pool:Pool', ('_cache',)),
    Part(GATE, 'celery.app.trace', ('trace_ok_t', 'TraceInfo', 'report_internal_error')),
    Part(LIFE, 'celery.app.amqp:Queues', ('select_add', 'consume_from')),
    Part(LIFE, 'celery.concurrency.prefork:TaskPool', ('_pool', 'terminate')),
    Part(LIFE, 'celery.worker.worker:WorkController', ('pool_cls',)),
    Part(SENDING, 'celery.app.base:Celery', ('_task_from_fun', '_tasks', 'amqp_cls')),
    Part(SENDING, 'celery.app.amqp:AMQP', ('_create_task_sender', 'Connection')),
    Part(SENDING, 'celery.app.task:Task', ('request_stack',)),
    Part(SENDING, 'celery.app.autoretry', ('_orig_run',)),
    Part(SENDING, 'celery.local:Proxy', ('_get_current_object',)),
    Part(
        SENDING,
        'celery.backends.redis:RedisBackend',
        ('_chord_zset', 'get_key_for_group', 'on_chord_part_return'),
    ),
    Part(SENDING, 'kombu.connection:Connection', ('_connection',)),
    Part(COLD, 'celery.concurrency.asynpool:AsynPool', ('_active_writes',)),
    Part(COLD, 'kombu.asynchronous.hub:Hub', ('create_loop', 'on_tick', 'on_close')),
)

#: What older versions lack, and do not need: it is used where it is there.
NEWER: tuple[Part, ...] = (
    Part(
        f'{RECEIVE}, from Celery 5.7 on',
        f'{_REDIS}:Channel',
        ('_brpop_sent_at', '_flush_brpop_reauth', '_pending_reauth_token'),
    ),
    Part(
        f'{SENDING}, from Celery 5.7 on',
        'celery.backends.redis:RedisBackend',
        ('_chord_part_return_script',),
    ),
)


def missing(uses: Iterable[str] = ()) -> list[str]:
    """What of it the installed versions lack, as 'owner.name'; an empty list is well.

    Args:
        uses: Only what is used for these; all, by default.
    """
    return missing_of(PARTS, uses)


def check_parts(driver: str, atomic: bool) -> bool:
    """Whether the installed versions have what the plugin uses of them.

    Args:
        driver: The broker's kind.
        atomic: Messages are to be received from Redis in one step.

    Returns:
        Whether they can be.

    Raises:
        ConfigurationError: They lack what keys would not be safe without.
    """
    on_redis = driver == 'redis'
    lacking = missing((GATE, LIFE, RESTORE) if on_redis else (GATE, LIFE))
    if lacking:
        raise ConfigurationError(
            f'the installed Celery or kombu lacks {", ".join(lacking)}, without which keys '
            'would not be safe: install versions that '
            'JobSync knows, with pip install "jobsync-workers[celery]"'
        )
    lacking = missing((RECEIVE, PASS_ON, CLIENTS)) if on_redis else []
    if lacking:
        logger.warning(
            "JobSync: the installed kombu or redis lacks %s: messages are received in kombu's "
            'way, and one can be lost when this '
            'worker is killed just while it is received; install versions that JobSync knows, '
            'with '
            'pip install "jobsync-workers[celery]"',
            ', '.join(lacking),
        )
    return on_redis and atomic and not lacking
