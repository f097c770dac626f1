"""When a node that drops a home queue is done with its own queue for it."""

from __future__ import annotations

from typing import Any

import pytest

from jobsync_core.config import CoordinationConfig
from jobsync_core.worker.framework import Framework
from jobsync_core.worker.node import WorkerNode
from jobsync_core.worker.settings import PluginSettings
from tests.support.fake_broker import Contents
from tests.support.fake_broker import FakeBroker as Broker


def test_it_is_not_while_something_from_it_is_in_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    class Homes:
        def __init__(self, homes: Any, **options: Any) -> None:
            given.update(options)

    monkeypatch.setattr('jobsync_core.worker.node.Homes', Homes)
    in_hand = {'mail'}
    broker: Any = Broker(Contents())
    broker.identify, broker.place = lambda make: '', ''
    node = WorkerNode(
        PluginSettings(config=CoordinationConfig(dbname='none', user='nobody')),
        'n1',
        Framework(
            kind='celery',
            broker=broker,
            homes=('mail',),
            declare=lambda home, queue: None,
            tasks=lambda: (),
            pins={},
            busy=lambda tokens: False,
            in_hand=in_hand.__contains__,
            problem=lambda: '',
            silence=lambda: 0.0,
            patience=5.0,
            on_lease=lambda leased: None,
        ),
    )
    monkeypatch.setattr(node.job, 'holds', lambda group: False)
    assert given['holds']('mail')
    in_hand.clear()
    assert not given['holds']('mail')
