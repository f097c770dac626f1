"""Dramatiq behind the suite's interface."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import dramatiq
from dramatiq.results import ResultFailure, ResultMissing

from .dramatiq_app import App, make_app
from .harness import Adapter, Outcome, Place

__all__ = ['DramatiqAdapter']

#: What a node's name has after that of its worker: master, process, start.
_START = re.compile(r'@\d+-\d+-[0-9a-f]+$')


class DramatiqAdapter(Adapter):
    """Runs `dramatiq`."""

    framework = 'dramatiq'
    pools: ClassVar[Mapping[str, str]] = {'processes': 'processes', 'threads': 'threads'}
    replaces_processes = False
    one_at_a_time: ClassVar[Mapping[str, Any]] = {'environment': {'dramatiq_queue_prefetch': '1'}}

    def __init__(
        self, place: Place, jobsync: bool, settings: dict[str, Any], pins: Sequence[str] = ()
    ) -> None:
        super().__init__(place, jobsync, settings, pins)
        #: A sender without JobSync, and one whose JobSync routes.
        self.app = make_app(replace(self.order, jobsync=False))
        self._routing: App | None = None
        self._sent: dict[str, Any] = {}

    @property
    def routing(self) -> App:
        """The app of a sender whose JobSync routes."""
        if self._routing is None:
            self._routing = make_app(self.order)
        return self._routing

    def sender(self, routed: bool) -> App:
        """The one or the other."""
        return self.routing if routed and self.jobsync else self.app

    def node_of(self, name: str) -> str:
        return name

    def worker_of(self, node: str) -> str:
        return _START.sub('', node)

    def nodes(self, pool: str) -> int:
        return 2 if pool == 'processes' else 1

    def command(self, name: str, pool: str, concurrency: int, options: Sequence[str]) -> list[str]:
        processes = self.nodes(pool)
        # The script: `python -m dramatiq` would reload itself with the first Python on PATH.
        return [
            str(Path(sys.executable).with_name('dramatiq')),
            '-p',
            str(processes),
            '-t',
            str(max(1, concurrency // processes)),
            'tests.conformance.dramatiq_worker',
            *options,
        ]

    def ready(self, name: str) -> str:
        return 'Worker process is ready for action.'

    def send(
        self, task: str, args: Sequence[Any] = (), *, routed: bool = False, **options: Any
    ) -> str:
        if 'delay' in options:
            options['delay'] = int(options['delay'] * 1000)
        return self.remember(
            self.sender(routed).actors[task].send_with_options(args=tuple(args), **options)
        )

    def remember(self, message: Any) -> str:
        """The id of a message whose outcome may be asked for."""
        self._sent[message.message_id] = message
        return str(message.message_id)

    def steps(self, tag: str, numbers: Sequence[int], routed: bool = False) -> Any:
        """A pipeline of which each step adds a number to the one before."""
        app = self.sender(routed)
        first, *others = numbers
        add = app.actors['add'].message_with_options
        messages = [
            add(args=(first, 0), kwargs={'tag': tag}),
            *(add(args=(number,), kwargs={'tag': tag}) for number in others),
        ]
        return dramatiq.pipeline(messages, broker=app.broker)

    def group(self, tag: str, numbers: Sequence[int], routed: bool = False) -> Any:
        """A group of additions, and `seal` for when all are done."""
        app = self.sender(routed)
        add = app.actors['add'].message_with_options
        group = dramatiq.group(
            [add(args=(n, n), kwargs={'tag': tag}) for n in numbers], broker=app.broker
        )
        group.add_completion_callback(app.actors['seal'].message(None, tag=tag))
        return group

    def send_steps(self, tag: str, numbers: Sequence[int], *, routed: bool = False) -> str:
        return self.remember(self.steps(tag, numbers, routed).run().messages[-1])

    def send_group(self, tag: str, numbers: Sequence[int], *, routed: bool = False) -> None:
        self.group(tag, numbers, routed).run()

    def outcome(self, message: str) -> Outcome:
        try:
            return Outcome('done', self.app.results.get_result(self._sent[message]))
        except ResultMissing:
            return Outcome('pending')
        except ResultFailure as error:
            # A message that is too old is skipped.
            return Outcome('revoked' if error.orig_exc_type == 'SkipMessage' else 'failed', error)

    def close(self) -> None:
        for app in (self.app, self._routing):
            if app is not None:
                app.close()
