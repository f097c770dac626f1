"""What an adapter hands over to a node: its framework, its broker and its worker, as values."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ..assignment.tokens import TokenSet
from ..logs import get_logger
from ..protocol.effects import RebalanceEvent
from .backlog import QueueCounter
from .broker import Broker, Delivery

__all__ = ['Framework', 'NodeBroker']


class NodeBroker(Broker, Protocol):
    """The broker, as a node needs it."""

    @property
    def place(self) -> str:
        """Its address, without a password."""

    def identify(self, make: bool) -> str | None:
        """The broker's mark, '' where it has none of its own; makes one where it is asked to, else
        None where there is none yet.
        """


@dataclass(frozen=True, kw_only=True)
class Framework:
    """What an adapter hands over of its framework and its worker.

    Args:
        kind: The plugin's name; one cluster has one plugin.
        broker: The broker; but for entering, used by the duties' thread alone.
        homes: The home queues that the worker consumes at its start.
        declare: Makes the node's queues at the broker, and the parked ones beside them: home queue
            -> the node's queue for it. While entering, where one is added, and when there is a
            lease again, as empty queues of a node that is taken for dead may be deleted.
        tasks: The names of the tasks, or actors, that the worker knows at this moment.
        pins: Pinned tasks.
        busy: Whether work on one of these tokens is running.
        in_hand: Whether the worker has a message that is not acknowledged from the node's queue for
            a home queue, and the broker would lose it with that queue.
        problem: Why the worker takes no messages; '' where it does.
        silence: Seconds for which it has taken none.
        patience: Seconds of silence after which the node gives its keys to others.
        on_lease: Called with False when the lease has run out, and with True when there is one
            again; again, if it raises.
        on_change: Called after each change of plan, when the owner map is up to date.
        on_tick: Called once a second.
        on_rebalance, on_release: The adapter's signals; the user's callbacks run as well.
        route: Makes the route of a message that does not tell it; None where it needs none.
        application: What the framework takes for the application's name.
        comes_back: A worker of the same name is the same node, so that it restores what its former
            life had taken.
        log: Where lines of the worker's life go.
        counter: Counts what waits at the broker, for autoscalers and metrics.
    """

    kind: str
    broker: NodeBroker
    homes: Sequence[str]
    declare: Callable[[Mapping[str, str]], object]
    tasks: Callable[[], Iterable[str]]
    pins: Mapping[str, Sequence[str]]
    busy: Callable[[TokenSet], bool]
    problem: Callable[[], str]
    silence: Callable[[], float]
    patience: float
    on_lease: Callable[[bool], object]
    in_hand: Callable[[str], bool] = lambda home: False
    on_change: Callable[[], object] = lambda: None
    on_tick: Callable[[], object] = lambda: None
    on_rebalance: Callable[[RebalanceEvent], object] = lambda event: None
    on_release: Callable[[TokenSet], object] = lambda tokens: None
    route: Callable[[Delivery], str | None] = lambda delivery: delivery.route
    application: str = ''
    comes_back: bool = False
    log: logging.Logger = field(default_factory=lambda: get_logger(__name__))
    counter: QueueCounter | None = None
