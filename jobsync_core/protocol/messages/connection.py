"""The control connection, and the database's history behind it."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ['Connect', 'ConnectReply', 'RecordHistory']


@dataclass(frozen=True)
class Connect:
    """Open the control connection (and LISTEN)."""


@dataclass(frozen=True)
class ConnectReply:
    """`server` names the server, where the answers cannot name the database's history; else it is
    ''.
    """

    server: str


@dataclass(frozen=True)
class RecordHistory:
    """All leases of earlier histories are over: let `history` be the cluster's; replies True.

    Nothing is done where the server's history has another name, or does not hold this node's last
    answered heartbeat (`seen`).
    """

    name: str
    incarnation: str
    seen: int
    history: str
