"""What is sent to Dramatiq's workers, how they are configured, and how they are started."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import dramatiq
from dramatiq.results.errors import ResultFailure, ResultMissing

from .dramatiq_app import OTHER_QUEUE, make_broker
from .harness import Configuration, Kind, Side

__all__ = ['CONFIGURATIONS', 'KINDS', 'DramatiqSide']


class Sender:
    """A broker without the plugin.

    Args:
        broker: The broker.
    """

    def __init__(self, broker: Any) -> None:
        self.broker = broker

    def message(self, name: str, *args: Any, **options: Any) -> Any:
        kwargs = options.pop('kwargs', {})
        return self.broker.actors[name].message_with_options(args=args, kwargs=kwargs, **options)

    def send(self, name: str, *args: Any, **options: Any) -> Any:
        """Send a message; itself."""
        delay = options.pop('delay', None)
        message = self.message(name, *args, **options)
        self.broker.enqueue(message, delay=delay)
        return message


def _one(name: str, *args: Any, **options: Any) -> Callable[[Sender], Mapping[str, Any]]:
    return lambda sender: {'': sender.send(name, *args, **options)}


def _many(name: str, number: int, **options: Any) -> Callable[[Sender], Mapping[str, Any]]:
    def send(sender: Sender) -> Mapping[str, Any]:
        kind = options.get('kind', name)
        return {
            str(each): sender.send(
                name,
                f'{kind}.{each}',
                **{key: value for key, value in options.items() if key != 'kind'},
            )
            for each in range(number)
        }

    return send


def _pipeline(sender: Sender) -> Mapping[str, Any]:
    steps = [
        sender.message('add', 'pipeline.first', 1, 2),
        sender.message('step', 1),
        sender.message('step', 10),
    ]
    dramatiq.pipeline(steps, broker=sender.broker).run()
    return {'first': steps[0], 'last': steps[-1]}


def _group(sender: Sender) -> Mapping[str, Any]:
    members = [sender.message('add', f'group.{each}', each, 1) for each in range(6)]
    group = dramatiq.group(members, broker=sender.broker)
    group.add_completion_callback(sender.message('echo', 'group.done'))
    group.run()
    return {str(each): member for each, member in enumerate(members)}


#: Options that nobody asked for and that a plain worker lives with.
_ODD: tuple[dict[str, Any], ...] = (
    {'eta': None},
    {'retries': 0},
    {'unknown': {'a': [None]}},
    {'jobsync_key': 'another'},
    {'jobsync_hops': 'x'},
    {'jobsync_home': []},
    {'jobsync_waits': -1},
)


def _odd(sender: Sender) -> Mapping[str, Any]:
    return {
        str(number): sender.send('echo', f'odd.{number}', number, **options)
        for number, options in enumerate(_ODD)
    }


KINDS = [
    Kind('plain', _one('echo', 'plain', 'a'), 1, {'': "SUCCESS 'a'"}),
    Kind('many', _many('echo', 40, kind='many'), 40),
    Kind('keywords', _one('echo', 'keywords', kwargs={'a': 1, 'b': [2]}), 1, {'': 'SUCCESS {'}),
    Kind('none', _one('echo', 'none'), 1, {'': 'SUCCESS None'}),
    Kind('unicode', _one('echo', 'unicode', 'ä日本\U0001f600\u2028'), 1, {'': 'SUCCESS'}),
    Kind('large', _one('echo', 'large', 'x' * 300_000), 1, {'': 'SUCCESS'}),
    Kind('delay', _one('echo', 'delay', 1, delay=700), 1, {'': 'SUCCESS 1'}),
    Kind('other', _one('other', 'other'), 1, {'': "SUCCESS 'other'"}),
    Kind('urgent', _many('urgent', 10), 10),
    Kind('silent', _one('silent', 'silent'), 1, {'': 'PENDING'}),
    Kind('sour', _one('sour', 'sour'), 1, {'': 'FAILURE'}),
    Kind('expected', _one('expected', 'expected'), 1, {'': 'FAILURE'}),
    Kind('wrong_arguments', _one('add', 'wrong_arguments', 1), 0, {'': 'FAILURE'}),
    Kind('retrying', _one('retrying', 'retrying', 2), 3, {'': 'SUCCESS 2'}),
    Kind('asking', _one('asking', 'asking'), 2, {'': "SUCCESS 'asked'"}),
    Kind('exhausted', _one('exhausted', 'exhausted'), 3, {'': 'FAILURE'}),
    Kind('success', _one('echo', 'success', 1, on_success='handler'), 2, {'': 'SUCCESS 1'}),
    Kind('failing', _one('sour', 'failing', on_failure='handler'), 2, {'': 'FAILURE'}),
    Kind('skipping', _one('skipping', 'skipping'), 1, {'': 'SUCCESS None'}),
    Kind('slow', _one('slow', 'slow'), 1, {'': 'FAILURE'}),
    Kind('old', _one('echo', 'old', 1, max_age=100, delay=1500), 0, {'': 'FAILURE'}),
    Kind('coroutine', _one('coroutine', 'coroutine'), 1, {'': "SUCCESS 'awaited'"}),
    Kind('classy', _one('classy', 'classy'), 1, {'': "SUCCESS 'Classy'"}),
    Kind('sending', _one('sending', 'sending'), 2, {'': "SUCCESS 'sent'"}),
    Kind('pipeline', _pipeline, 3, {'first': 'SUCCESS 3'}),
    Kind('group', _group, 7),
    Kind('odd', _odd, len(_ODD)),
    Kind(
        'priority', _many('echo', 10, kind='priority', broker_priority=3), 10, brokers=('rabbitmq',)
    ),
]
_FEW = ('plain', 'many', 'delay', 'other', 'sour', 'retrying', 'pipeline', 'group')
_REDIS, _AMQP = ('redis',), ('rabbitmq',)
CONFIGURATIONS = [
    Configuration('default', modes=('idle', 'all', 'once', 'free'), without=('priority',)),
    Configuration(
        'one thread', options=('-t', '1'), kinds=(*_FEW, 'exhausted', 'coroutine'), soak=True
    ),
    Configuration('two processes', options=('-p', '2'), kinds=_FEW, soak=True),
    Configuration('spawn', options=('--use-spawn',), kinds=_FEW, soak=True),
    Configuration('named queues', options=('-Q', 'default', OTHER_QUEUE), kinds=_FEW),
    Configuration('namespace', {'namespace': 'shop'}, brokers=_REDIS, kinds=_FEW),
    Configuration(
        'maintenance', {'maintenance_chance': 1_000_000}, brokers=_REDIS, kinds=_FEW, soak=True
    ),
    Configuration('priorities', {'max_priority': 10}, brokers=_AMQP, kinds=(*_FEW, 'priority')),
    Configuration(
        'quorum by default',
        {'confirm_delivery': True},
        brokers=('quorum',),
        kinds=(*_FEW, 'exhausted', 'wrong_arguments', 'old', 'large', 'skipping'),
        modes=('all', 'once', 'free'),
    ),
    Configuration('confirmed', {'confirm_delivery': True}, brokers=_AMQP, kinds=_FEW, soak=True),
]


class DramatiqSide(Side):
    """Two `dramatiq` masters."""

    ready = 'Worker process is ready for action.'

    def command(self, name: str) -> list[str]:
        processes = () if '-p' in self.configuration.options else ('-p', '1')
        return [
            sys.executable,
            '-m',
            'dramatiq',
            'tests.parity.dramatiq_worker',
            *processes,
            *self.configuration.options,
        ]

    def sender(self) -> Sender:
        self._sender = Sender(
            make_broker(self.order, dict(self.configuration.settings), plugin=False)
        )
        return self._sender

    def send_last(self) -> None:
        self._sender.send('last')

    def close_sender(self) -> None:
        if '_sender' not in vars(self):
            return
        broker = self._sender.broker
        broker.close()
        for holder in (
            broker,
            *(
                getattr(item, 'backend', None) or getattr(item, 'rate_limiter_backend', None)
                for item in broker.middleware
            ),
        ):
            client = getattr(holder, 'client', None)
            if client is not None:
                client.close()

    def outcome(self, asked: Any) -> str:
        try:
            return f'SUCCESS {self._sender.broker.get_results_backend().get_result(asked)!r}'[:200]
        except ResultMissing:
            return 'PENDING'
        except ResultFailure as error:
            return f'FAILURE {error}'[:200]
