"""Runs both sides in turns, A B B A, so that a drift of the machine weighs on both alike."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from .nodes import ChildFailed, Databases
from .peer import Side
from .table import Limit, Row

__all__ = ['Bench', 'Samples', 'eventually']


@dataclass
class Samples:
    """What each side gave: metric → values, per side; or the reason why it gave nothing."""

    values: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def add(self, side: Side, figures: Mapping[str, float]) -> None:
        """Take the figures of one run."""
        for metric, value in figures.items():
            self.values.setdefault(side.key, {}).setdefault(metric, []).append(value)

    def median(self, key: str, metric: str) -> float | None:
        """The median of a side's values; None where there are none."""
        values = self.values.get(key, {}).get(metric)
        return statistics.median(values) if values and key not in self.failures else None

    def row(
        self,
        metric: str,
        label: str,
        unit: str,
        *,
        note: str = '',
        limit: Limit | None = None,
        more: bool = False,
    ) -> Row:
        """The row of a metric. A failure becomes its footnote."""
        failed = '; '.join(f'{key} failed: {reason}' for key, reason in self.failures.items())
        return Row(
            label,
            unit,
            self.median('ours', metric),
            self.median('peer', metric),
            failed or note,
            limit,
            more,
        )


@dataclass
class Bench:
    """What a measurement needs.

    Args:
        databases: Fresh databases on the server.
        sides: Ours, and the peer where it is measured.
        quick: One run of each side, and smaller sizes.
        raw: All values, for JSON.
    """

    databases: Databases
    sides: list[Side]
    quick: bool
    raw: dict[str, dict[str, dict[str, list[float]]]] = field(default_factory=dict)

    def turns(self, rounds: int = 1) -> list[Side]:
        """The order in which the sides run: A B B A, `rounds` times; A B when quick."""
        if self.quick:
            return list(self.sides)
        return (self.sides + self.sides[::-1]) * rounds

    def run(
        self, name: str, measure: Callable[[Side], Mapping[str, float]], rounds: int = 1
    ) -> Samples:
        """Measure each side in its turns. A side that fails is not tried again.

        Args:
            name: Under which the values are kept.
            measure: Gives the metrics of one run.
            rounds: Of two runs of each side.
        """
        samples = Samples()
        for side in self.turns(rounds):
            if side.key in samples.failures:
                continue
            began = time.monotonic()
            try:
                samples.add(side, measure(side))
            except ChildFailed as failure:
                samples.failures[side.key] = str(failure)
            state = samples.failures.get(side.key, 'done')
            print(
                f'  {name}: {side.title}, {time.monotonic() - began:.1f} s, {state}',
                file=sys.stderr,
                flush=True,
            )
        self.raw[name] = samples.values
        return samples


def eventually(condition: Callable[[], bool], timeout: float, every: float = 0.1) -> float:
    """Wait for a condition; the monotonic time at which it was seen to hold.

    Raises:
        ChildFailed: It did not hold within `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    while True:
        now = time.monotonic()
        if condition():
            return now
        if now > deadline:
            raise ChildFailed(f'what was waited for did not happen within {timeout:g} s')
        time.sleep(every)
