"""Frameworks × brokers × pools: what the scenarios are run on."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from .celery_adapter import CeleryAdapter
from .dramatiq_adapter import DramatiqAdapter
from .harness import QUICK, STEADY, Adapter

__all__ = ['ADAPTERS', 'BROKERS', 'JOBSYNC', 'QUICK', 'SOAK', 'STEADY', 'Setup', 'setups']

#: CONFORMANCE_JOBSYNC=0 runs what the bare framework passes too, without JobSync: so the harness
#: itself is proved.
JOBSYNC = os.environ.get('CONFORMANCE_JOBSYNC', '1') != '0'
#: CONFORMANCE_SOAK=20 makes loads and numbers of faults twenty times as large.
SOAK = int(os.environ.get('CONFORMANCE_SOAK', '1'))
ADAPTERS: Mapping[str, type[Adapter]] = {'celery': CeleryAdapter, 'dramatiq': DramatiqAdapter}
BROKERS = ('redis', 'rabbitmq')


@dataclass(frozen=True)
class Setup:
    """What a scenario runs on.

    Attributes:
        framework: A key of ADAPTERS.
        broker: 'redis', 'rabbitmq', or 'quorum' (see `tests.support.taking`).
        kind: Of pool: 'processes', 'threads' or 'single'.
    """

    framework: str
    broker: str
    kind: str

    @property
    def pool(self) -> str:
        """The framework's name for the kind of pool."""
        return ADAPTERS[self.framework].pools[self.kind]

    @property
    def name(self) -> str:
        return f'{self.framework}-{self.broker}-{self.pool}'

    def __str__(self) -> str:
        return self.name


def setups(
    *kinds: str, framework: str | None = None, brokers: tuple[str, ...] = BROKERS
) -> list[Setup]:
    """Every combination, of certain kinds of pool, one framework or certain brokers if given."""
    return [
        Setup(name, broker, kind)
        for name, adapter in ADAPTERS.items()
        for broker in brokers
        for kind in adapter.pools
        if (not kinds or kind in kinds) and framework in (None, name)
    ]
