"""What becomes of a delivery: one pure function of values, which the gates of both frameworks carry
out.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from .routing import parked_queue, unknown_queue

__all__ = ['Action', 'Here', 'Outcome', 'Received', 'Rules', 'may_begin', 'place']


class Action(Enum):
    """What a gate does with a delivery.

    RUN: hand it on to the worker. SEND: publish it to a queue, confirmed, then acknowledge it here.
    WAIT: hold it, unacknowledged, and ask again. REQUEUE: it goes back to the queue it came from.
    DROP: acknowledge it. DEAD_LETTER: set it aside where its queue's dead letters go.
    """

    RUN = 'run'
    SEND = 'send'
    WAIT = 'wait'
    REQUEUE = 'requeue'
    DROP = 'drop'
    DEAD_LETTER = 'dead-letter'


@dataclass(frozen=True)
class Received:
    """What is known of a delivery.

    Attributes:
        incarnation: The life of this node that received it.
        route: The task id that its owner is found by; None: its task has no affinity or is not
            coordinated, or nobody here knows.
        hops: How often it was handed on.
        until: When it is parked if nobody owns it by then, in seconds on the monotonic clock.
        known: This node's consumers know its task.
        problem: Why no route can be made for it; '' where one can.
        home: The queue that it was sent to.
    """

    incarnation: str
    route: str | None
    hops: int = 0
    until: float = 0.0
    known: bool = True
    problem: str = ''
    home: str = ''


@dataclass(frozen=True)
class Here:
    """What is so on this node at this moment, of one route in one queue.

    Attributes:
        node: The node's name.
        incarnation: Its present life.
        mine: It may claim the route.
        leased: It has a valid lease.
        owner: Who owns the route, or is about to; None where nobody does.
        queue: The owner's queue; None where it has none.
        unmatched: It has a pin, or a lock, that no node matches which consumes the queue.
        deserted: No node consumes the queue, this one neither.
    """

    node: str
    incarnation: str
    mine: bool
    leased: bool
    owner: str | None = None
    queue: str | None = None
    unmatched: bool = False
    deserted: bool = False


@dataclass(frozen=True)
class Rules:
    """What the cluster's settings say.

    Attributes:
        appname: The cluster's.
        max_hops: How often a message may be handed on; more is a sign of nodes that disagree, and
            time lets them agree.
        drop: Other nodes get each message too: what is another's is dropped.
    """

    appname: str
    max_hops: int = 4
    drop: bool = False

    @property
    def unknown(self) -> str:
        """Name of the queue of messages whose task nobody knew."""
        return unknown_queue(self.appname)

    def parked(self, home: str) -> str:
        """Name of the queue of those messages of a home queue that nobody takes now."""
        return parked_queue(home, self.appname)


@dataclass(frozen=True)
class Outcome:
    """What becomes of a delivery.

    Attributes:
        action: What is done.
        queue: SEND: where it goes.
        hops: SEND: the number of hops that it carries then.
        event: What is counted when it is done; '' for nothing.
        reason: Why, for logs.
    """

    action: Action
    queue: str = ''
    hops: int = 0
    event: str = ''
    reason: str = ''


_RUN = Outcome(Action.RUN)


def place(delivery: Received, here: Here, rules: Rules, now: float) -> Outcome:
    """What becomes of a delivery.

    Args:
        delivery: What is known of it.
        here: What is so on this node, of its route in its queue.
        rules: What the settings say.
        now: The moment, in seconds on the monotonic clock.
    """
    # 1. Nobody can tell where it may run, now or later.
    if delivery.problem:
        return Outcome(Action.DEAD_LETTER, reason=delivery.problem)
    # 2. This node was taken for dead meanwhile, and others have restored what it had: this may be
    #    one of two.
    if delivery.incarnation != here.incarnation:
        return Outcome(Action.REQUEUE, event='returned', reason='of an earlier life')
    # 3. No owner to look for, or this node is the owner. Another node may know the task, or this
    #    one after an upgrade.
    anywhere = delivery.route is None
    if (anywhere or here.mine) and not delivery.known:
        return Outcome(Action.SEND, rules.unknown, 0, 'unknown', 'its task is not known here')
    if here.mine or (anywhere and here.leased):
        return _RUN
    # 4. The lease watch stops the consumer, and what waits goes back. What may run anywhere may
    #    not run here either: others may be about to restore it.
    if not here.leased:
        return Outcome(Action.WAIT, reason='no lease')
    # 5. Nobody consumes its queue any more: there it waits for who will.
    if here.deserted:
        return Outcome(Action.SEND, delivery.home, 0, 'sent_home', 'nobody consumes its queue')
    # 6. No node that there is will own it: it keeps no place of others here.
    if here.unmatched:
        reason = 'no node matches its pin'
        return Outcome(Action.SEND, rules.parked(delivery.home), 0, 'parked', reason)
    # 7. Never to oneself: the owner map is older, or younger, than the local set, and will agree
    #    with it in a moment.
    if here.owner is None or here.owner == here.node:
        reason = 'no owner yet' if here.owner is None else 'not here yet'
        return _park(delivery, rules, now, reason)
    # 8. The owner got it too.
    if rules.drop:
        return Outcome(Action.DROP, event='dropped', reason=f'belongs to {here.owner}')
    # 9. It goes to its owner, if it can.
    if here.queue is None:
        return _park(delivery, rules, now, f'{here.owner} takes no messages')
    if delivery.hops >= rules.max_hops:
        return _park(delivery, rules, now, f'{delivery.hops} hops')
    return Outcome(
        Action.SEND, here.queue, delivery.hops + 1, 'forwarded', f'belongs to {here.owner}'
    )


def _park(delivery: Received, rules: Rules, now: float, reason: str) -> Outcome:
    """Wait a moment in memory for an owner, then at the broker."""
    if now < delivery.until:
        return Outcome(Action.WAIT, reason=reason)
    return Outcome(Action.SEND, rules.parked(delivery.home), 0, 'parked', reason)


def may_begin(delivery: Received, here: Here) -> bool:
    """The last look, right before a task runs: whether it may run here still. What may not goes
    back, or on.

    Without a lease others may be about to put its message back.
    """
    if delivery.incarnation != here.incarnation:
        return False
    return here.leased if delivery.route is None else here.mine
