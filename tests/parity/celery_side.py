"""Celery's side of the parity suite: kinds of messages, configurations, and a cluster of two
workers.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
import sys
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta, timezone
from typing import Any, ClassVar

from celery import Celery, chain, chord, group, uuid
from celery.result import AsyncResult
from kombu.entity import Exchange, Queue

from .celery_app import OTHER_QUEUE, make_app
from .harness import Configuration, Kind, Side

__all__ = ['CONFIGURATIONS', 'KINDS', 'CelerySide']

_UNFINISHED = ('PENDING', 'STARTED', 'RETRY', 'RECEIVED', 'PROGRESS')


class Sender:
    """What kinds send through."""

    def __init__(self, app: Celery) -> None:
        self.app = app

    def s(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """A signature."""
        return self.app.tasks[name].s(*args, **kwargs)

    def send(
        self, name: str, *args: Any, kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> Any:
        """Send a message; its result."""
        return self.app.tasks[name].apply_async(args, dict(kwargs or {}), **options)


Send = Callable[[Sender], Mapping[str, Any]]
#: Not with a key that is the message's id: two messages of one id are one key, and a direct call of
#: a task (map, chunks) has no message.
_ALL_BUT_ONCE = ('idle', 'all')


def _one(task: str, *args: Any, kwargs: Mapping[str, Any] | None = None, **options: Any) -> Send:
    """One message; its label is the name of its kind, which is put in by `_kind`."""

    def send(sender: Sender, name: str = '') -> Mapping[str, Any]:
        return {
            '': sender.send(
                task,
                name,
                *args,
                kwargs=kwargs,
                **{key: value() if callable(value) else value for key, value in options.items()},
            )
        }

    return send


def _kind(
    name: str, send: Any, runs: int = 1, outcome: str | Mapping[str, str] = 'SUCCESS', **more: Any
) -> Kind:
    outcomes = {'': outcome} if isinstance(outcome, str) else outcome
    takes_name = 'name' in send.__code__.co_varnames
    return Kind(
        name, (lambda sender: send(sender, name)) if takes_name else send, runs, outcomes, **more
    )


def _revoked(sender: Sender) -> Mapping[str, Any]:
    result = sender.send('echo', 'revoked', 1, countdown=1.5)
    sender.app.control.revoke(result.id)
    return {'': result}


def _to_graveyard(task: str, count: int) -> Send:
    """So many that some are sent on to the queue of a node, and some are not."""

    def send(sender: Sender, name: str = '') -> Mapping[str, Any]:
        with sender.app.connection_for_write() as connection:
            Queue('graveyard', _DEAD)(connection.default_channel).declare()
        return {str(n): sender.send(task, f'{name}.{n}') for n in range(count)}

    return send


def _chain(sender: Sender) -> Mapping[str, Any]:
    return {
        '': chain(
            sender.s('add', 1, 2, label='chain.1'),
            sender.s('add', 3, label='chain.2'),
            sender.s('add', 4, label='chain.3'),
        ).apply_async()
    }


def _group(sender: Sender) -> Mapping[str, Any]:
    return {'': group(sender.s('add', n, n, label=f'group.{n}') for n in range(5)).apply_async()}


def _chord(sender: Sender) -> Mapping[str, Any]:
    return {
        '': chord(
            [sender.s('add', n, n, label=f'chord.{n}') for n in range(6)],
            sender.s('total', label='chord.end'),
        ).apply_async()
    }


def _chord_error(sender: Sender) -> Mapping[str, Any]:
    end = sender.s('total', label='chord_error.end').on_error(sender.app.tasks['failed_chord'].s())
    return {
        '': chord(
            [sender.s('add', 1, 1, label='chord_error.1'), sender.s('sour', 'chord_error.2')], end
        ).apply_async()
    }


def _chord_of_chains(sender: Sender) -> Mapping[str, Any]:
    steps = [
        chain(
            sender.s('add', n, 1, label='chord_of_chains.1'),
            sender.s('add', 1, label='chord_of_chains.2'),
        )
        for n in range(3)
    ]
    return {'': chord(steps, sender.s('total', label='chord_of_chains.end')).apply_async()}


def _group_in_chain(sender: Sender) -> Mapping[str, Any]:
    steps = (
        sender.s('add', 1, 1, label='group_in_chain.1')
        | group(sender.s('add', n, label='group_in_chain.2') for n in range(3))
        | sender.s('total', label='group_in_chain.3')
    )
    return {'': steps.apply_async()}


def _link(sender: Sender) -> Mapping[str, Any]:
    after = sender.s('add', 10, label='link.after')
    task_id = after.options.setdefault('task_id', uuid())
    return {
        '': sender.send('add', 1, 2, kwargs={'label': 'link.first'}, link=after),
        'after': sender.app.AsyncResult(task_id),
    }


def _link_error(sender: Sender) -> Mapping[str, Any]:
    return {'': sender.send('sour', 'link_error', link_error=sender.app.tasks['failed'].s())}


def _chunks(sender: Sender) -> Mapping[str, Any]:
    return {
        '': sender.app.tasks['add'].chunks([(n, n, 'chunks') for n in range(6)], 2).apply_async()
    }


def _map(sender: Sender) -> Mapping[str, Any]:
    return {
        '': sender.app.tasks['echo'].map(['map', 'map', 'map']).apply_async(),
        'star': sender.app.tasks['add'].starmap([(1, 1, 'map'), (2, 2, 'map')]).apply_async(),
    }


def _many(name: str, task: str, count: int, *args: Any, **options: Any) -> Send:
    return lambda sender: {str(n): sender.send(task, name, *args, **options) for n in range(count)}


def _same_id(sender: Sender) -> Mapping[str, Any]:
    task_id = uuid()
    return {'': [sender.send('echo', 'same_id', 1, task_id=task_id) for _ in range(2)][1]}


def _by_name(sender: Sender) -> Mapping[str, Any]:
    return {'': sender.app.send_task('echo', ('by_name', 3))}


def _replace(sender: Sender) -> Mapping[str, Any]:
    return {'': sender.send('replacing', 'replace')}


def _ago(seconds: float) -> datetime:
    return datetime.now(timezone.utc) - timedelta(seconds=seconds)


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


KINDS = [
    _kind('plain', _one('echo', 1)),
    _kind('many', _many('many', 'echo', 20, 1), 20, {'0': 'SUCCESS 1', '19': 'SUCCESS 1'}),
    _kind('keywords', _one('echo', kwargs={'value': {'a': [1, 2.5, None, True, 'ä☃']}})),
    _kind('large', _one('echo', 'x' * 300_000)),
    _kind('unicode', _one('echo', 'Grüße, 世界 \u2603 \\ " \n')),
    _kind('countdown', _one('echo', 1, countdown=0.7)),
    _kind('whole_seconds', _one('echo', 1, countdown=2)),
    _kind('eta', _one('echo', 1, eta=lambda: _ago(-0.7))),
    _kind('eta_past', _one('echo', 1, eta=lambda: _ago(5))),
    # RabbitMQ drops what expires before a worker has taken it: there is time for that.
    _kind('expires', _one('echo', 1, countdown=3.5, expires=2.5), 0, 'REVOKED'),
    _kind('expires_date', _one('echo', 1, countdown=3.5, expires=lambda: _ago(-2.5)), 0, 'REVOKED'),
    _kind('expires_later', _one('echo', 1, expires=600)),
    _kind('revoked', _revoked, 0, 'REVOKED'),
    _kind('priority', _one('seen', priority=6)),
    _kind('headers', _one('seen', headers={'colour': 'blue'})),
    _kind('shadow', _one('seen', shadow='another name')),
    _kind('timelimits', _one('seen', time_limit=50, soft_time_limit=40)),
    _kind('limited', _many('limited', 'limited', 6), 6, {'0': 'SUCCESS', '5': 'SUCCESS'}),
    _kind('ignored', _one('silent'), 1, 'PENDING'),
    _kind('ignored_call', _one('echo', 1, ignore_result=True), 1, 'PENDING'),
    _kind('gzip', _one('echo', 'gzip' * 1000, compression='gzip')),
    _kind('zlib', _one('echo', 'zlib' * 1000, compression='zlib')),
    _kind('bzip2', _one('echo', 'bzip2' * 1000, compression='bzip2')),
    _kind('json', _one('echo', {'b': [1]}, serializer='json')),
    _kind('pickle', _one('echo', {'a': (1, 2)}, serializer='pickle')),
    _kind('pickle_gzip', _one('echo', {'a': (1, 2)}, serializer='pickle', compression='gzip')),
    *([_kind('yaml', _one('echo', {'a': [1, 2]}, serializer='yaml'))] if _has('yaml') else []),
    *(
        [_kind('msgpack', _one('echo', {'a': [1, 2]}, serializer='msgpack'))]
        if _has('msgpack')
        else []
    ),
    _kind('early', _one('early')),
    _kind('late', _one('late')),
    _kind('late_failure', _one('late', True), 1, 'FAILURE'),
    _kind('failure', _one('sour'), 1, 'FAILURE Odd sour'),
    _kind('unpicklable', _one('unpicklable'), 1, 'FAILURE'),
    _kind('unencodable', _one('unencodable'), 1, 'FAILURE'),
    _kind(
        'wrong_arguments',
        lambda sender: {'': sender.app.send_task('add', (1,))},
        0,
        'FAILURE TypeError',
    ),
    _kind('retry', _one('retrying', 2), 3, 'SUCCESS 2'),
    _kind('retries_over', _one('retrying', 9), 4, 'FAILURE Odd'),
    _kind('autoretry', _one('autoretry', 1), 2, 'SUCCESS 1'),
    _kind('autoretry_over', _one('autoretry', 9), 3, 'FAILURE Odd'),
    _kind('soft_limit', _one('softly'), 1, 'FAILURE SoftTimeLimitExceeded'),
    _kind('hard_limit', _one('hard'), 1, 'FAILURE TimeLimitExceeded'),
    _kind(
        'soft_limit_call', _one('sleepy', 20, soft_time_limit=1), 1, 'FAILURE SoftTimeLimitExceeded'
    ),
    _kind('bound', _one('bound')),
    _kind('class_based', _one('classy')),
    *([_kind('pydantic', _one('priced', {'number': 1}))] if _has('pydantic') else []),
    _kind('stateful', _one('stateful')),
    _kind('sends_another', _one('sending'), 2),
    _kind('replace', _replace, 2, 'SUCCESS instead'),
    _kind('ignore', _one('ignoring'), 1, ''),
    _kind('reject', _one('rejecting'), 1, ''),
    _kind('dead_letter', _to_graveyard('rejecting', 8), 8, {}, brokers=('rabbitmq',)),
    _kind('poison', _to_graveyard('poisonous', 6), 6, {}, brokers=('quorum',)),
    _kind('reject_requeue', _one('rejecting_once'), 2, 'SUCCESS'),
    _kind('by_name', _by_name, 1, 'SUCCESS 3'),
    _kind('same_id', _same_id, 2, 'SUCCESS 1', modes=_ALL_BUT_ONCE),
    _kind('other_queue', _one('echo', 1, queue=OTHER_QUEUE)),
    _kind('route', _one('routed')),
    _kind('chain', _chain, 3, 'SUCCESS 10'),
    _kind('group', _group, 5, 'SUCCESS [0, 2, 4, 6, 8]'),
    _kind('chord', _chord, 7, 'SUCCESS 30'),
    _kind('chord_error', _chord_error, 3, 'FAILURE ChordError'),
    _kind('chord_of_chains', _chord_of_chains, 7, 'SUCCESS 9'),
    _kind('group_in_chain', _group_in_chain, 5, 'SUCCESS 9'),
    _kind('link', _link, 2, {'': 'SUCCESS 3', 'after': 'SUCCESS 13'}),
    _kind('link_error', _link_error, 2, 'FAILURE Odd'),
    _kind('chunks', _chunks, 6, 'SUCCESS [[0, 2], [4, 6], [8, 10]]', modes=_ALL_BUT_ONCE),
    _kind('map', _map, 5, {'': 'SUCCESS [', 'star': 'SUCCESS [2, 4]'}, modes=_ALL_BUT_ONCE),
]

_FEW = (
    'plain',
    'many',
    'countdown',
    'expires',
    'revoked',
    'failure',
    'retry',
    'chain',
    'chord',
    'link',
    'early',
    'late',
    'ignored',
)
_LIMITS = ('hard_limit',)  # a hard limit needs processes
_NO_LIMITS = (*_LIMITS, 'soft_limit', 'soft_limit_call')
_DEAD = Exchange('dead', type='fanout')
_DEAD_ARGUMENTS = {'x-dead-letter-exchange': 'dead'}
_DEAD_QUEUES = {
    'task_queues': [
        Queue('celery', Exchange('celery'), routing_key='celery', queue_arguments=_DEAD_ARGUMENTS),
        Queue(OTHER_QUEUE, queue_arguments=_DEAD_ARGUMENTS),
        Queue('dead.XQ', _DEAD),
    ]
}
_LIMITED = {
    'x-queue-type': 'quorum',
    'x-delivery-limit': 2,
    'x-dead-letter-exchange': 'dead',
    'x-dead-letter-strategy': 'at-most-once',
}
#: As Celery's chapter on quorum queues says.
_QUORUM = {
    'task_default_queue_type': 'quorum',
    'task_default_exchange_type': 'topic',
    'worker_detect_quorum_queues': True,
    'broker_transport_options': {'confirm_publish': True},
}
_LIMITED_QUEUES = {
    'task_queues': [
        Queue('celery', Exchange('celery'), routing_key='celery', queue_arguments=_LIMITED),
        Queue(OTHER_QUEUE, queue_arguments=_LIMITED),
    ],
    'broker_transport_options': {'confirm_publish': True},
}
_AMQP, _REDIS = ('rabbitmq',), ('redis',)

CONFIGURATIONS = [
    Configuration('default', modes=('idle', 'all', 'once', 'free')),
    Configuration('threads', options=('-P', 'threads'), without=_NO_LIMITS, modes=('all', 'once')),
    Configuration(
        'solo', options=('-P', 'solo'), without=(*_NO_LIMITS, 'reject_requeue'), soak=True
    ),
    Configuration(
        'late and careful',
        {
            'task_acks_late': True,
            'task_reject_on_worker_lost': True,
            'worker_prefetch_multiplier': 1,
            'task_track_started': True,
        },
        soak=True,
    ),
    Configuration(
        'failures not acknowledged',
        {'task_acks_late': True, 'task_acks_on_failure_or_timeout': False},
        kinds=_FEW,
        soak=True,
    ),
    Configuration(
        'protocol 1',
        {'task_protocol': 1},
        kinds=(*_FEW, 'gzip', 'keywords', 'bound', 'eta', 'group', 'other_queue'),
        soak=True,
    ),
    Configuration(
        'pickle',
        {'task_serializer': 'pickle', 'result_serializer': 'pickle'},
        kinds=(*_FEW, 'keywords', 'group', 'gzip'),
        soak=True,
    ),
    Configuration(
        'compressed',
        {'task_compression': 'gzip', 'result_compression': 'zlib'},
        kinds=(*_FEW, 'retry', 'autoretry'),
        soak=True,
    ),
    Configuration(
        'extended results',
        {
            'result_extended': True,
            'task_store_errors_even_if_ignored': True,
            'task_send_sent_event': True,
        },
        options=('-E',),
        kinds=(*_FEW, 'replace', 'stateful'),
        soak=True,
    ),
    Configuration(
        'no results',
        {'task_ignore_result': True},
        kinds=(
            'plain',
            'many',
            'countdown',
            'failure',
            'retry',
            'autoretry',
            'chain',
            'link',
            'link_error',
            'early',
            'late',
            'class_based',
        ),
        results=False,
        soak=True,
    ),
    Configuration(
        'other names',
        {
            'task_default_queue': 'jobs',
            'task_default_exchange': 'work',
            'task_default_routing_key': 'go',
        },
        options=('-Q', f'jobs,{OTHER_QUEUE}'),
        kinds=(*_FEW, 'other_queue', 'route', 'autoretry'),
        soak=True,
    ),
    Configuration(
        'topic exchange',
        {
            'task_queues': [
                Queue('celery', Exchange('tasks', type='topic'), routing_key='task.#'),
                Queue(OTHER_QUEUE, Exchange('tasks', type='topic'), routing_key='other'),
            ],
            'task_default_exchange': 'tasks',
            'task_default_exchange_type': 'topic',
            'task_default_routing_key': 'task.default',
        },
        kinds=(*_FEW, 'other_queue', 'route'),
    ),
    Configuration(
        'fair and recycled',
        options=('-O', 'fair', '--max-tasks-per-child', '3'),
        kinds=(*_FEW, 'many', 'group'),
        soak=True,
    ),
    Configuration('autoscale', options=('--autoscale', '3,1'), kinds=(*_FEW, 'many'), soak=True),
    Configuration(
        'no gossip, no mingle',
        options=('--without-gossip', '--without-mingle', '--without-heartbeat'),
        kinds=_FEW,
        soak=True,
    ),
    Configuration(
        'key prefix',
        {'broker_transport_options': {'global_keyprefix': 'shop:'}},
        brokers=_REDIS,
        kinds=(*_FEW, 'priority', 'large'),
    ),
    Configuration(
        'redis priorities',
        {
            'broker_transport_options': {
                'priority_steps': [0, 3, 6, 9],
                'queue_order_strategy': 'priority',
                'sep': ':',
            }
        },
        brokers=_REDIS,
        kinds=(*_FEW, 'priority'),
        soak=True,
    ),
    Configuration(
        'priorities',
        {'task_queue_max_priority': 10, 'task_default_priority': 3},
        brokers=_AMQP,
        kinds=(*_FEW, 'priority', 'other_queue'),
    ),
    Configuration(
        'confirmed',
        {'broker_transport_options': {'confirm_publish': True}},
        brokers=_AMQP,
        kinds=_FEW,
        soak=True,
    ),
    Configuration(
        'dead letters',
        _DEAD_QUEUES,
        options=('-Q', f'celery,{OTHER_QUEUE}'),
        brokers=_AMQP,
        kinds=(*_FEW, 'other_queue'),
    ),
    Configuration(
        'dead letters of what is rejected',
        _DEAD_QUEUES,
        options=('-Q', f'celery,{OTHER_QUEUE}'),
        brokers=_AMQP,
        kinds=('plain', 'dead_letter', 'reject_requeue', 'other_queue'),
        modes=('all', 'once', 'free'),
        left={'graveyard': 8},
    ),
    Configuration(
        'what cannot be delivered',
        _LIMITED_QUEUES,
        options=('-Q', f'celery,{OTHER_QUEUE}'),
        brokers=('quorum',),
        kinds=('plain', 'poison', 'dead_letter', 'reject_requeue', 'other_queue'),
        modes=('all', 'once', 'free'),
        left={'graveyard': 14},
    ),
    Configuration(
        'a queue with priorities and another without',
        {
            'task_queues': [
                Queue('celery', Exchange('celery'), routing_key='celery', max_priority=10),
                Queue(OTHER_QUEUE),
            ]
        },
        options=('-Q', f'celery,{OTHER_QUEUE}'),
        brokers=_AMQP,
        kinds=(*_FEW, 'priority', 'other_queue'),
        soak=True,
    ),
    Configuration(
        'quorum by default',
        {'broker_transport_options': {'confirm_publish': True}},
        brokers=('quorum',),
        kinds=(*_FEW, 'other_queue', 'route', 'eta', 'group', 'reject_requeue', 'large'),
        modes=('all', 'once', 'free'),
    ),
    # Plain Celery's delayed delivery knows whole seconds alone.
    Configuration(
        'quorum by configuration',
        _QUORUM,
        brokers=('quorum',),
        kinds=(
            *(each for each in _FEW if each not in ('countdown', 'retry')),
            'whole_seconds',
            'other_queue',
            'route',
            'group',
        ),
        modes=('once',),
    ),
]


class CelerySide(Side):
    """Two `celery worker`s."""

    ready = '@parity ready.'
    _app: ClassVar[Celery | None] = None

    def command(self, name: str) -> list[str]:
        queues = () if '-Q' in self.configuration.options else ('-Q', f'celery,{OTHER_QUEUE}')
        if 'task_queues' in self.configuration.settings:
            queues = ()
        size = () if {'solo', '--autoscale'} & set(self.configuration.options) else ('-c', '2')
        return [
            sys.executable,
            '-m',
            'celery',
            '-A',
            'tests.parity.celery_worker',
            'worker',
            '-n',
            f'{name}@parity',
            '-l',
            'INFO',
            *size,
            *queues,
            *self.configuration.options,
        ]

    def sender(self) -> Sender:
        app = make_app(self.order, dict(self.configuration.settings), plugin=False)
        # Outcomes are asked for. A subscription to each would be ended when its result object is
        # collected, long after the server.
        with contextlib.suppress(AttributeError):
            app.backend.result_consumer.consume_from = lambda task_id: None
        self._sender = Sender(app)
        if 'dead letters' in self.configuration.name:
            with app.connection_for_write() as connection:
                Queue('dead.XQ', _DEAD)(connection.default_channel).declare()
        return self._sender

    def send_last(self) -> None:
        self._sender.send('last')

    def close_sender(self) -> None:
        if '_sender' in vars(self):
            self._sender.app.close()

    def outcome(self, asked: AsyncResult) -> str:
        children = getattr(asked, 'results', None)
        if children is not None:
            states = [self.outcome(child) for child in children]
            if any(state.split()[0] in _UNFINISHED for state in states):
                return 'PENDING'
            values = [child.result for child in children]
            return (
                f'SUCCESS {values!r}'
                if all(state.startswith('SUCCESS') for state in states)
                else f'FAILURE {states}'
            )
        meta = self._sender.app.backend.get_task_meta(asked.id)
        status, result = meta['status'], meta['result']
        if status in _UNFINISHED:
            return str(status)
        if isinstance(result, BaseException):
            text = f'{type(result).__name__} {result}'
        else:
            text = result if isinstance(result, str) else repr(result)
        # Ids and addresses differ from run to run.
        text = re.sub(r'[0-9a-f]{8}-[0-9a-f-]{27}', 'ID', re.sub(r'0x[0-9a-f]+', '0x', text))
        return f'{status} {text[:200]}'
