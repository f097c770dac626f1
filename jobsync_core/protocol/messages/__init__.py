"""What a node says to the store and what it hears: plain values, no behaviour.

There is a module for each part of the protocol, which produces requests and consumes replies. The
PostgreSQL store (store/cluster.py) and the simulated store (tests/sim) both answer them. Each
request is atomic: it happens wholly or not at all, at one instant, and its reply may be lost after
it happened. Every request carries the incarnation that it speaks for, so that a statement which
arrives late can do no harm.
"""

from __future__ import annotations

from typing import TypeAlias

from .connection import Connect, ConnectReply, RecordHistory
from .groups import Enroll, EnrollReply
from .handover import Give, GiveReply, Lives, LivesReply, Refresh, RefreshReply, Take, TakeReply
from .leadership import Evict, EvictReply, Lead, Observe, ObserveReply, RoundReply, StepDown
from .membership import (
    Activate,
    ActivateReply,
    Beat,
    Drain,
    HeartbeatReply,
    Join,
    JoinReply,
    Leave,
    Mismatch,
    Occupied,
)

__all__ = ['Reply', 'Request']

Request: TypeAlias = (
    Connect
    | Join
    | Beat
    | Refresh
    | Take
    | Lives
    | Give
    | Activate
    | Drain
    | Enroll
    | Leave
    | Observe
    | Evict
    | Lead
    | StepDown
    | RecordHistory
)
Reply: TypeAlias = (
    ConnectReply
    | JoinReply
    | Occupied
    | Mismatch
    | HeartbeatReply
    | RefreshReply
    | TakeReply
    | LivesReply
    | GiveReply
    | ActivateReply
    | EnrollReply
    | ObserveReply
    | EvictReply
    | RoundReply
    | bool
    | None
)
