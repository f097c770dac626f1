"""Taking the plugin out: what it keeps in queues of its own goes back to where it was sent to.

A message is published to its home queue, confirmed, and only then taken out of the plugin's queue,
so that what breaks off in between makes a second copy and never none. What belongs to live nodes is
left alone: they are emptied by their own consumers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from .. import clock
from ..config import CoordinationConfig
from ..logs import get_logger
from ..store.queues import QueueStore
from ..store.sessions import Sessions
from ..store.tables import Tables
from .broker import Broker, Delivery
from .routing import home_of_queue, mark_key, node_queue, parked_queue, unknown_queue

__all__ = ['Evacuable', 'Evacuated', 'evacuate']

logger = get_logger(__name__)

#: Messages that fail one after another: then it is the broker that fails.
_IN_A_ROW = 3


class Evacuable(Broker, Protocol):
    """The broker, as an evacuation needs it."""

    #: The plugin's name.
    kind: str

    def places(self) -> Iterable[str]:
        """Names of queues of this plugin that the broker itself knows of, with messages or records
        of taken ones; it may know of none.
        """

    def close(self) -> None:
        """Close all connections."""


@dataclass
class Evacuated:
    """What an evacuation did.

    Attributes:
        restored: Messages that dead nodes had taken and not acknowledged, and that were restored.
        moved: Messages that went home, by home queue.
        deleted: Queues that were empty and are gone.
        busy: Nodes that are alive, or that somebody else was sweeping: their queues were left
            alone.
        failed: What went wrong, by queue; the others went on.
    """

    restored: int = 0
    moved: dict[str, int] = field(default_factory=dict)
    deleted: list[str] = field(default_factory=list)
    busy: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether nothing was left behind."""
        return not self.busy and not self.failed


def evacuate(
    broker: Evacuable, config: CoordinationConfig, tell: Callable[[str], object] = lambda line: None
) -> Evacuated:
    """Move home what is in queues of nodes that are gone, what they had taken, and what is parked.

    It may run while workers do, with the plugin or without, and as often as one likes. Each queue
    is emptied of what was in it when its turn came, and no more: a gate that is still alive may put
    messages back.

    Args:
        broker: The broker.
        config: The cluster.
        tell: Called with a line for each queue.

    Raises:
        DatabaseUnavailable: The database cannot be reached.
    """
    tables = Tables.of(config)
    sessions = Sessions(config, 'jobsync evacuate')
    done = Evacuated()
    try:
        with sessions.session() as connection:
            found = QueueStore(connection, tables).known(broker.kind)
        known = {queue: node for queue, node, _ in found}
        unknown = unknown_queue(config.appname)
        shared = {parked_queue(home, config.appname) for home in ('', *(row[2] for row in found))}
        dead = _dead(sessions, tables, config.heartbeat_timeout_sec, tell)
        for name in broker.places():
            home = home_of_queue(name, config.appname)
            if home is None or name in (unknown, mark_key(config.appname)):
                continue
            if name == parked_queue(home, config.appname):
                shared.add(name)
            else:
                before = node_queue(home, config.appname, '')
                known.setdefault(name, name[len(before) :])
        for queue, node in sorted(known.items()):
            _guarded(
                broker,
                done,
                queue,
                tell,
                partial(_leave_node, broker, sessions, tables, queue, node, dead, done),
            )
        for queue in [*sorted(shared), unknown]:
            # As the nodes hold it that look after it.
            held = queue if home_of_queue(queue, config.appname) else ''
            leave = partial(_leave_shared, broker, sessions, tables, queue, held, done)
            _guarded(broker, done, queue, tell, leave)
        return done
    finally:
        sessions.close_all()


def _guarded(
    broker: Evacuable,
    done: Evacuated,
    queue: str,
    tell: Callable[[str], object],
    action: Callable[[], str],
) -> None:
    # One queue that cannot be emptied holds up no other.
    try:
        tell(f'{queue}: {action()}')
    except Exception as error:  # whatever the broker's client raises
        broker.reset()
        done.failed[queue] = ' '.join(str(error).split()) or type(error).__name__
        tell(f'{queue}: failed: {done.failed[queue]}')


def _dead(
    sessions: Sessions, tables: Tables, timeout_sec: float, tell: Callable[[str], object]
) -> dict[str, tuple[Any, ...]]:
    """Nodes in the table that are dead, and their last signs of life. Where all were killed, nobody
    has removed their rows: one that sends nothing for a whole timeout is dead.
    """
    with sessions.session() as connection:
        silent = QueueStore(connection, tables).heartbeats()
    until = clock.now() + timeout_sec
    if silent:
        tell(f'looking for {timeout_sec:g} s which of {len(silent)} nodes are alive')
    while silent and clock.now() < until:
        time.sleep(min(0.25, timeout_sec / 8))
        with sessions.session() as connection:
            now = QueueStore(connection, tables).heartbeats()
        silent = {node: sign for node, sign in silent.items() if now.get(node) == sign}
    return silent


def _is_alive(
    sessions: Sessions, tables: Tables, node: str, dead: dict[str, tuple[Any, ...]]
) -> bool:
    """Whether a node lives now: it may have come, or come back, since they were counted."""
    with sessions.session() as connection:
        sign = QueueStore(connection, tables).heartbeats().get(node)
    return sign is not None and sign != dead.get(node)


def _leave_node(
    broker: Evacuable,
    sessions: Sessions,
    tables: Tables,
    queue: str,
    node: str,
    dead: dict[str, tuple[Any, ...]],
    done: Evacuated,
) -> str:
    with sessions.session() as connection:
        if not QueueStore(connection, tables).hold(node):
            _note_busy(done, node)
            return 'somebody else is sweeping it; once more, later'
        if _is_alive(sessions, tables, node, dead):
            _note_busy(done, node)
            return f'left alone: its node {node} is alive'
        restored = broker.restore(node)
        done.restored += restored
        moved = _move(broker, queue, done)
        deleted = broker.delete(queue)
        if deleted:
            done.deleted.append(queue)
            QueueStore(connection, tables).forget([queue])
        return f'{restored} restored, {moved} moved home' + (', deleted' if deleted else '')


def _leave_shared(
    broker: Evacuable, sessions: Sessions, tables: Tables, queue: str, held: str, done: Evacuated
) -> str:
    with sessions.session() as connection:
        if not QueueStore(connection, tables).hold(held):
            _note_busy(done, held)
            return 'a node is looking at it; once more, later'
        return f'{_move(broker, queue, done)} moved home'


def _note_busy(done: Evacuated, what: str) -> None:
    if what not in done.busy:  # a node has several queues
        done.busy.append(what)


def _move(broker: Evacuable, queue: str, done: Evacuated) -> int:
    moved = in_a_row = 0
    kept: list[Delivery] = []
    try:
        for _ in range(broker.size(queue)):
            delivery = broker.take(queue)
            if delivery is None:
                break
            home = delivery.home
            try:
                delivery.forward(home)
            # it stays, and those behind it go on; several in a row are the broker's fault
            except Exception as error:
                kept.append(delivery)
                in_a_row += 1
                if in_a_row == _IN_A_ROW:
                    raise
                logger.warning(
                    'queue=%s id=%s cannot go to %s, and stays: %r', queue, delivery.id, home, error
                )
                continue
            in_a_row = 0
            done.moved[home] = done.moved.get(home, 0) + 1
            moved += 1
    finally:
        for delivery in reversed(kept):
            delivery.requeue()
    return moved
