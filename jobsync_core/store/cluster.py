"""A node's requests, answered by PostgreSQL.

Whatever changes who owns what holds the cluster's row, so that such changes come one after the
other; leaders hold the cluster's advisory lock besides. Heartbeats take neither, and wait for
nobody.
"""

from __future__ import annotations

import datetime

from ..config import CoordinationConfig
from ..protocol.messages import Reply, Request
from ..protocol.messages.connection import RecordHistory
from ..protocol.messages.groups import Enroll
from ..protocol.messages.handover import Give, Lives, Refresh, Take
from ..protocol.messages.leadership import Evict, Lead, Observe, StepDown
from ..protocol.messages.membership import Activate, Beat, Drain, Join, Leave
from .connection import Connection
from .epochs import Epochs
from .handover import HandOverStore
from .leading import LeaderStore
from .nodes import NodeStore
from .tables import Tables

__all__ = ['ClusterStore']


class ClusterStore:
    """Answers each request of protocol/messages on the agent's connection.

    Args:
        config: The cluster's settings.
        tables: Names of the tables.
        date: The date whose audit and claims count; None: none do.
        resume: What a cluster has audited counts for the next one too, if this node is its first.

    Attributes:
        tables: Names of the tables.
        epochs: When a cluster ends.
        leader: Evicts and plans.
        nodes: The node's own row.
        handover: Tokens that change hands.
    """

    def __init__(
        self,
        config: CoordinationConfig,
        tables: Tables,
        date: datetime.date | None,
        resume: bool = False,
    ) -> None:
        self.tables = tables
        self.epochs = Epochs(resume)
        self.leader = LeaderStore(config, tables, self.epochs)
        self.nodes = NodeStore(config, tables, self.epochs)
        self.handover = HandOverStore(config, tables, date)

    def handle(self, connection: Connection, request: Request) -> Reply:
        """Carry the request out, wholly or not at all.

        Raises:
            DatabaseUnavailable: The connection is lost; the request may have been carried out.
            StoreTimeout: No answer in time; likewise.
            StatementRefused: The server refused; nothing was changed.
        """
        if isinstance(request, Beat):
            return self.nodes.beat(connection, request)
        if isinstance(request, Refresh):
            return self.nodes.refresh(connection, request)
        if isinstance(request, Observe):
            return self.leader.observe(connection)
        if isinstance(request, Evict):
            return self.leader.evict(connection, request)
        if isinstance(request, Lead):
            return self.leader.lead(connection, request)
        if isinstance(request, Take):
            return self.handover.take(connection, request)
        if isinstance(request, Lives):
            return self.handover.lives(connection, request)
        if isinstance(request, Give):
            return self.handover.give(connection, request)
        if isinstance(request, Join):
            return self.nodes.join(connection, request)
        if isinstance(request, Activate):
            return self.nodes.activate(connection, request)
        if isinstance(request, Drain):
            return self.nodes.drain(connection, request)
        if isinstance(request, Enroll):
            return self.nodes.enroll(connection, request)
        if isinstance(request, Leave):
            return self.nodes.leave(connection, request)
        if isinstance(request, StepDown):
            return self.nodes.step_down(connection, request)
        if isinstance(request, RecordHistory):
            return self.nodes.record_history(connection, request)
        raise TypeError(f'{type(request).__name__} is no request for the store')
