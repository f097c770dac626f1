"""What schedules of faults begin with: a cluster, and chances."""

from __future__ import annotations

from .node import LEASE_FRACTION
from .schedule import TIMEOUT, Run

__all__ = ['have_groups', 'some_duration', 'some_times', 'start_cluster']


def start_cluster(run: Run, count: int | None = None, *, spread: float = 1.0) -> float:
    """Start a cluster; returns when it should be formed."""
    rng = run.world.rng
    count = count or rng.choice((2, 3, 3, 4, 4, 5, 6))
    weighted = rng.random() < 0.2
    for index in range(count):
        name = f'n{index}'
        run.names.append(name)
        run.spawn(
            name,
            delay=rng.random() * spread,
            weight=rng.choice((0.5, 1.0, 2.0, 3.0)) if weighted else None,
        )
    return spread + run.settings.wait_on_enter + 2.0


def some_times(run: Run, start: float, length: float, most: int, least: int = 1) -> list[float]:
    rng = run.world.rng
    return sorted(start + rng.random() * length for _ in range(rng.randint(least, most)))


def some_duration(run: Run) -> float:
    """Lengths around the times that matter: a hiccup, near the lease, near the timeout, long."""
    rng = run.world.rng
    return rng.choice(
        (
            rng.random() * 0.2 * TIMEOUT,
            rng.uniform(0.8, 1.2) * LEASE_FRACTION * TIMEOUT,
            rng.uniform(0.9, 1.3) * TIMEOUT,
            rng.uniform(1, 3) * TIMEOUT,
        )
    )


def have_groups(run: Run) -> None:
    run.groups = run.groups or ('a', 'b', 'c')[: run.world.rng.randint(1, 3)]
