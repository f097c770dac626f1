"""The Celery measurements: variants, workers, and how long a killed worker's messages are away."""

from __future__ import annotations

import sys

from .celery_app import MODES
from .messages import Failed, Framework, Stage, Variant

__all__ = ['FRAMEWORK']

_VISIBILITY_SEC = 30


def _variants() -> list[Variant]:
    locks = [
        ('exactly_once', 'once'),
        ('celery-once', 'celery_once'),
        ('celery-singleton', 'celery_singleton'),
    ]
    found = []
    for group, pool, processes in (
        ('one worker, solo', 'solo', 1),
        ('one worker, prefork 2', 'prefork', 2),
    ):
        rows: list[tuple[str, str, float | None]] = [
            ('plain Celery', 'plain', None),
            ('plain Celery, acks_late', 'plain_late', None),
            ('uncoordinated tasks', 'uncoordinated', 0.99),
            ('coordinated, all owned', 'coordinated', 0.95),
            *((title, mode, None) for title, mode in locks),
        ]
        found += [
            Variant(title, mode, group, 1, pool, processes, least) for title, mode, least in rows
        ]
    return [
        *found,
        *(
            Variant(title, mode, 'two workers, solo', 2, least=least)
            for title, mode, least in (
                ('plain Celery', 'plain', None),
                ('coordinated, half forwarded', 'coordinated', 0.7),
                ('producer-routed', 'routed', 0.95),
            )
        ),
    ]


def _arguments(stage: Stage, name: str, pool: str, concurrency: int, queues: str) -> list[str]:
    return [
        'celery',
        '-A',
        'bench.celery_app',
        'worker',
        '-n',
        f'{name}@bench',
        '-P',
        pool,
        '-c',
        str(concurrency),
        '-Q',
        queues,
        '-l',
        'WARNING',
        *(
            ['--jobsync-node', name]
            if MODES[stage.environment['BENCH_MODE']] == 'jobsync_celery'
            else []
        ),
    ]


def _command(stage: Stage, name: str, variant: Variant) -> list[str]:
    return _arguments(stage, name, variant.pool, variant.concurrency, f'celery,hold.{name}')


def _send(stage: Stage, task: str, queue: str) -> None:
    from celery import Celery

    with Celery('driver', broker=stage.environment['BENCH_BROKER']) as producer:
        producer.send_task(task, queue=queue, ignore_result=True)


def _hold(stage: Stage, variant: Variant) -> None:
    """Every process of the pools is busy until the driver says go."""
    for name, _ in stage.workers:
        for _ in range(variant.concurrency):
            _send(stage, 'hold', f'hold.{name}')
    held = variant.workers * variant.concurrency
    stage.wait('held', lambda: bool(stage.client.llen('held') == held))


def _go(stage: Stage, variant: Variant) -> None:
    stage.client.rpush('go', *range(variant.workers * variant.concurrency))


def _recovery(stage: Stage) -> dict[str, float]:
    found = {}
    for title, mode in (
        (f'plain Celery, visibility_timeout={_VISIBILITY_SEC}', 'plain'),
        ('JobSync, heartbeat_timeout_sec=15', 'pinned'),
    ):
        try:
            found[title] = _recover(stage, mode)
        except Failed as failure:
            print(f'recovery, {title}: {failure}', file=sys.stderr)
    return found


def _recover(stage: Stage, mode: str) -> float:
    """Seconds from a worker's SIGKILL until all that it had prefetched was run by another; two
    prefork workers.

    Raises:
        Failed: There is no figure.
    """

    def start(name: str, concurrency: int, queues: str) -> None:
        stage.start(name, _arguments(stage, name, 'prefork', concurrency, queues))

    coordinated = mode != 'plain'
    with stage.run(mode, **({} if coordinated else {'BENCH_VISIBILITY_SEC': str(_VISIBILITY_SEC)})):
        start('first', 1, 'celery,stick')
        if coordinated:
            start('second', 2, 'celery')
            stage.wait('tokens', lambda: stage.owners() == 2)
        _send(stage, 'stick', 'stick')
        unacked = 'jobsync.sync_.first.unacked' if coordinated else 'unacked'
        # Acknowledged early: the message that is running is lost with plain Celery, and no part of
        # this.
        stage.wait(
            'stuck',
            lambda: bool(
                not stage.broker.llen('stick')
                and stage.broker.hlen(unacked) == 0
                and stage.broker.exists('_kombu.binding.stick')
            ),
        )
        stage.publish('bench.celery_app', 3)
        stage.wait('prefetched', lambda: bool(stage.broker.hlen(unacked) == 3))
        if not coordinated:
            start('second', 2, 'celery,hold.second')
            _send(stage, 'hold', 'hold.second')
            stage.wait('second', lambda: bool(stage.client.llen('held') == 1))
        killed = stage.kill(0)
        stage.wait('recovery', lambda: stage.completed() >= 3, 300)
        stage.client.rpush('go', 1)
        return max(moment for moment, _ in stage.times()) - killed


FRAMEWORK = Framework(
    'Celery',
    'bench.celery_app',
    MODES,
    _variants(),
    4000,
    _command,
    _hold,
    _go,
    _recovery,
    'exactly_once and the lock packages: compare "publish + work", since those do half of theirs '
    'in the producer.',
)
