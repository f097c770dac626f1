"""A node that adds and drops home queues: when its own queue for one is made, and when it is done
with that.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from jobsync_core.config import CoordinationConfig
from jobsync_core.errors import JobSyncError
from jobsync_core.worker.framework import Framework
from jobsync_core.worker.node import WorkerNode
from jobsync_core.worker.settings import PluginSettings
from tests.support.fake_broker import Contents, FakeBroker


class Stage:
    """The node `n1`, which consumes `mail`, and what its home queues are given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.in_hand: set[str] = set()
        self.swept: set[str] = set()
        self.log: list[str] = []
        self.given: dict[str, Any] = {}
        monkeypatch.setattr('jobsync_core.worker.node.Homes', self._homes)
        monkeypatch.setattr('jobsync_core.worker.node.QueueRegistry', lambda *_: self)
        broker: Any = FakeBroker(Contents())
        broker.identify, broker.place = lambda make: '', ''
        self.node = WorkerNode(
            PluginSettings(config=CoordinationConfig(dbname='none', user='nobody')),
            'n1',
            Framework(
                kind='celery',
                broker=broker,
                homes=('mail',),
                declare=lambda queues: self.log.extend(
                    f'declare {queue}' for queue in queues.values()
                ),
                tasks=lambda: (),
                pins={},
                busy=lambda tokens: False,
                in_hand=self.in_hand.__contains__,
                problem=lambda: '',
                silence=lambda: 0.0,
                patience=5.0,
                on_lease=lambda leased: None,
            ),
        )
        monkeypatch.setattr(self.node.job, 'holds', lambda group: False)

    def _homes(self, homes: Any, **options: Any) -> Any:
        self.given.update(options)
        return SimpleNamespace(queues={}, wanted=frozenset())

    def retire(self, queues: Any) -> None:
        """As the registry's."""

    @contextmanager
    def held(self, node: str) -> Iterator[bool]:
        """As the registry's."""
        free = node not in self.swept
        self.log.append('hold')
        yield free
        self.log.append('let go')


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    return Stage(monkeypatch)


def test_it_is_not_done_while_something_from_it_is_in_hand(stage: Stage) -> None:
    stage.in_hand.add('mail')
    assert stage.given['holds']('mail')
    stage.in_hand.clear()
    assert not stage.given['holds']('mail')


def test_it_is_made_while_nobody_sweeps_it_who_may_delete_it(stage: Stage) -> None:
    stage.given['declare']('mail', 'mail.n1')
    assert stage.log == ['hold', 'declare mail.n1', 'let go']
    stage.swept.add('n1')
    with pytest.raises(JobSyncError, match='is being swept'):
        stage.given['declare']('mail', 'mail.n1')
    assert stage.log.count('declare mail.n1') == 1
