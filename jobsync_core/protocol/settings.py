"""What the protocol must know of the cluster's settings and of its node's."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ['Settings']


@dataclass(frozen=True)
class Settings:
    """What the protocol must know of a CoordinationConfig and a Job.

    All times in seconds; `lease` counts from the sending of a heartbeat. has_release: somebody
    wants to be told before tokens are handed over. has_gate: the grace period does not end before
    `open_gate` is called (locks are registered first). groups: names of the queue groups that the
    node belongs to from its start.
    """

    interval: float = 5.0
    timeout: float = 15.0
    lease: float = 13.5
    check_interval: float = 30.0
    release_timeout: float = 5.0
    wait_on_enter: float = 0.0
    minimum_nodes: int = 1
    weight: float = 1.0
    total_tokens: int = 10_000
    hash_function: str = 'double_sha256'
    has_release: bool = False
    has_gate: bool = False
    groups: tuple[str, ...] = ()

    @property
    def poll(self) -> float:
        """Seconds between two looks of the leader and its successor at the node table."""
        return min(0.75, self.timeout / 8)

    @property
    def max_gap(self) -> float:
        """Seconds without a look after which an observer starts its waits anew."""
        return max(2 * self.poll, 1.5 * self.interval, (self.timeout - self.interval) / 2)
