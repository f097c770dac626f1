"""How a node takes part in its cluster."""

from __future__ import annotations

import datetime
from dataclasses import dataclass

from ..config import CoordinationConfig
from ..protocol.settings import Settings

__all__ = ['Participation']


@dataclass(frozen=True)
class Participation:
    """How a node takes part: what the arguments of `Job` say.

    Attributes:
        clears_locks: Whether locks that a node of this name created go when it enters.
        has_gate: Whether something is to be done before tokens are given out.
        has_release: Whether the user is told before tokens go.
        groups: Names of its queue groups, in order.
    """

    date: datetime.date
    wait_on_enter: float
    wait_on_exit: float
    weight: float
    resume: bool
    clears_locks: bool
    has_gate: bool
    has_release: bool
    groups: tuple[str, ...] = ()

    def settings(self, config: CoordinationConfig) -> Settings:
        """What the protocol must know of it, and of the cluster."""
        return Settings(
            interval=config.heartbeat_interval_sec,
            timeout=config.heartbeat_timeout_sec,
            lease=config.lease_sec,
            check_interval=config.rebalance_check_interval_sec,
            release_timeout=config.release_timeout_sec,
            wait_on_enter=self.wait_on_enter,
            minimum_nodes=config.minimum_nodes,
            weight=self.weight,
            total_tokens=config.total_tokens,
            hash_function=config.hash_function,
            has_release=self.has_release,
            has_gate=self.has_gate,
            groups=self.groups,
        )
