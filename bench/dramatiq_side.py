"""The Dramatiq measurements: variants and workers."""

from __future__ import annotations

from .dramatiq_app import MODES, STAGING
from .messages import Framework, Stage, Variant

__all__ = ['FRAMEWORK']

_THREADS = 8


def _variants() -> list[Variant]:
    one, two = f'one process, {_THREADS} threads', f'two processes, {_THREADS} threads each'
    return [
        *(
            Variant(title, mode, one, concurrency=_THREADS, least=least)
            for title, mode, least in (
                ('plain Dramatiq', 'plain', None),
                ('uncoordinated actors', 'uncoordinated', 0.99),
                ('coordinated, all owned', 'coordinated', 0.95),
                ('exactly_once', 'once', 0.5),
            )
        ),
        *(
            Variant(title, mode, two, 2, concurrency=_THREADS, least=least)
            for title, mode, least in (
                ('plain Dramatiq', 'plain', None),
                ('coordinated, half forwarded', 'coordinated', 0.7),
                ('producer-routed', 'routed', 0.95),
                ('exactly_once', 'once', 0.5),
            )
        ),
    ]


def _command(stage: Stage, name: str, variant: Variant) -> list[str]:
    return ['dramatiq', '-p', '1', '-t', str(variant.concurrency), 'bench.dramatiq_app']


def _hold(stage: Stage, variant: Variant) -> None:
    """Nothing: the messages are published to another part of Redis. But all workers look for them
    by now.
    """
    # A worker's signs of life, one for each broker.
    stage.wait(
        'consuming', lambda: bool(stage.broker.zcard('dramatiq:__heartbeats__') == variant.workers)
    )


def _go(stage: Stage, variant: Variant) -> None:
    with stage.broker.pipeline() as pipe:
        for key in stage.broker.keys(f'{STAGING}:*'):
            if stage.broker.type(key) == 'list' or key.endswith('.msgs'):
                pipe.rename(key, 'dramatiq' + key.removeprefix(STAGING))
        pipe.execute()


FRAMEWORK = Framework(
    'Dramatiq',
    'bench.dramatiq_app',
    MODES,
    _variants(),
    10_000,
    _command,
    _hold,
    _go,
    note='exactly_once: two durable commits in PostgreSQL for each message.',
)
