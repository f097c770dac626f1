"""Celery behind the suite's interface."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from celery import Celery, chain, chord, uuid

from .celery_app import make_app
from .harness import Adapter, Outcome, Place
from .work import Order

__all__ = ['CeleryAdapter']

_STATES = {'SUCCESS': 'done', 'FAILURE': 'failed', 'REVOKED': 'revoked'}


class CeleryAdapter(Adapter):
    """Runs `celery worker`."""

    framework = 'celery'
    pools: ClassVar[Mapping[str, str]] = {
        'processes': 'prefork',
        'threads': 'threads',
        'single': 'solo',
    }
    replaces_processes = True
    one_at_a_time: ClassVar[Mapping[str, Any]] = {
        'conf': {'worker_prefetch_multiplier': 1, 'task_acks_late': True}
    }

    def __init__(
        self, place: Place, jobsync: bool, settings: dict[str, Any], pins: Sequence[str] = ()
    ) -> None:
        super().__init__(place, jobsync, settings, pins)
        #: A sender without JobSync, and one whose JobSync routes.
        self.app = _sender(replace(self.order, jobsync=False))
        self._routing: Celery | None = None

    @property
    def routing(self) -> Celery:
        """The app of a sender whose JobSync routes."""
        if self._routing is None:
            self._routing = _sender(self.order)
        return self._routing

    def node_of(self, name: str) -> str:
        return f'{name}@test'

    def worker_of(self, node: str) -> str:
        return node.partition('@')[0]

    def nodes(self, pool: str) -> int:
        return 1

    def command(self, name: str, pool: str, concurrency: int, options: Sequence[str]) -> list[str]:
        return [
            sys.executable,
            '-m',
            'celery',
            '-A',
            'tests.conformance.celery_worker',
            'worker',
            '-n',
            self.node_of(name),
            '-P',
            pool,
            '-c',
            str(1 if pool == 'solo' else concurrency),
            '-l',
            'INFO',
            *options,
        ]

    def ready(self, name: str) -> str:
        return f'{self.node_of(name)} ready.'

    def send(
        self, task: str, args: Sequence[Any] = (), *, routed: bool = False, **options: Any
    ) -> str:
        app = self.routing if routed and self.jobsync else self.app
        if 'delay' in options:
            options['countdown'] = options.pop('delay')
        options.setdefault('task_id', uuid())
        app.tasks[task].apply_async(tuple(args), **options)
        return str(options['task_id'])

    def send_steps(self, tag: str, numbers: Sequence[int], *, routed: bool = False) -> str:
        add = (self.routing if routed and self.jobsync else self.app).tasks['add']
        first, *others = numbers
        return str(
            chain(add.s(0, first, tag=tag), *(add.s(number, tag=tag) for number in others))
            .apply_async()
            .id
        )

    def send_group(self, tag: str, numbers: Sequence[int], *, routed: bool = False) -> None:
        tasks = (self.routing if routed and self.jobsync else self.app).tasks
        chord(
            [tasks['add'].s(number, number, tag=tag) for number in numbers],
            tasks['seal'].s(tag=tag),
        ).apply_async()

    def outcome(self, message: str) -> Outcome:
        meta = self.app.backend.get_task_meta(message)
        state = _STATES.get(meta['status'], 'pending')
        return Outcome(state, meta['status'] if state == 'pending' else meta['result'])

    def close(self) -> None:
        for app in (self.app, self._routing):
            if app is not None:
                app.close()


def _sender(order: Order) -> Celery:
    app = make_app(order)
    # Outcomes are asked for. A subscription to each would be ended when its result object is
    # collected, long after the server.
    app.backend.result_consumer.consume_from = lambda task_id: None
    return app
