"""Whether a worker takes messages: what probes ask, and by what a node gives its keys away that is
cut off from its broker.

Such a node still reaches the database, so that its lease stays valid, and the others would send its
keys to a queue that nobody empties.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from .. import clock
from ..job import Job
from ..logs import Repeats, get_logger
from ..results import NodeInfo

__all__ = ['Consuming', 'SelfDrain']

logger = get_logger(__name__)

#: Seconds after which a trouble that lasts is told again.
_SAY_AGAIN_SEC = 60.0
#: The part of the timeout after which a silent node says so, and for which it waits for another one
#: that does not. In an outage of the broker itself all say so before one of them drains.
_EARLY = 0.4
#: Looks for which each node waits for one whose turn is before its own.
_LOOKS = 3


class Consuming:
    """When each of a worker's queues was looked at last. Those who consume tell; probes and
    `SelfDrain` ask. Any thread may.

    Args:
        patience: Seconds without a look after which a queue does not count as consumed.
    """

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._looked: dict[str, float] = {}
        self._lost: dict[str, str] = {}
        self._lost_at = self._said = 0.0
        self._lock = threading.Lock()
        self._since = clock.now()
        #: The worker shuts down, or gives everything back: it takes nothing, whatever its threads
        #: do.
        self.stopped = False

    def looked(self, queue: str) -> None:
        """The broker has answered a request for this queue's messages, even if there was none."""
        self._looked[queue] = clock.now()
        if queue in self._lost:
            with self._lock:
                self._lost.pop(queue, None)
                over, self._said = not self._lost, 0.0 if not self._lost else self._said
            if over:
                logger.info(
                    'JobSync: the broker answers again, after %.0f s', clock.now() - self._lost_at
                )

    def rests(self, queue: str) -> None:
        """Nothing is asked for by intention: the time does not count as silence."""
        self._looked[queue] = clock.now()

    def lost(self, queue: str, reason: object) -> None:
        """The broker cannot be asked for this queue's messages. For all queues together that is
        said once, then once a minute.
        """
        now = clock.now()
        with self._lock:
            if not self._lost:
                self._lost_at = now
            self._lost[queue] = str(reason)
            say = not self._said or now - self._said >= _SAY_AGAIN_SEC
            if say:
                self._said = now
        if say:
            logger.warning(
                'JobSync: no messages of %d queues for %.0f s, as the broker cannot be asked: %s '
                '-- it is tried again and again',
                len(self._lost),
                now - self._lost_at,
                ' '.join(str(reason).split()),
            )

    def problem(self) -> str:
        """Why the worker does not consume; '' where it does."""
        if self.stopped:
            return 'stopped'
        now = clock.now()
        if not self._looked and not self._lost:
            return 'not yet'
        for queue, reason in list(self._lost.items()):
            return f'{queue}: {reason}'
        for queue, at in list(self._looked.items()):
            if now - at > self._patience:
                return f'{queue}: for {now - at:.0f} s nobody has looked'
        return ''

    def silence(self, queue: str | None = None) -> float:
        """Seconds since a look at this queue, or at any; counted from the start where there was
        none.
        """
        looked = dict(self._looked)
        last = (
            looked.get(queue, self._since)
            if queue is not None
            else max(looked.values(), default=self._since)
        )
        return max(0.0, clock.now() - last)


class SelfDrain:
    """A thread that drains a node which has not consumed for a heartbeat timeout, until it does
    again: where others consume. In an outage of the broker itself no keys move.

    Args:
        job: The node.
        silence: Seconds for which the node has not consumed.
        timeout: Seconds of silence after which the node gives its tokens away.
        tell: Has the others know whether this node is silent.
    """

    def __init__(
        self,
        job: Job,
        silence: Callable[[], float],
        timeout: float,
        tell: Callable[[bool], object] = lambda silent: None,
    ) -> None:
        self._job = job
        self._tell = tell
        self._told = False
        #: The silence since which another node has been seen to consume; None: none was seen.
        self._others_from: float | None = None
        self._silence = silence
        self._timeout = timeout
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name='jobsync-consuming', daemon=True)
        #: This has drained the node; an operator's drain is not touched.
        self.drained = False
        self._alone = False
        #: Looks in a row at which no node was active.
        self._deserted = 0
        self._repeats = Repeats()

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread; the node stays as it is."""
        self._end.set()
        if self._thread.ident is not None:
            self._thread.join(5.0)

    def look(self) -> None:
        """Drain or undrain the node, if it is time."""
        silence = self._silence()
        if silence <= _EARLY * self._timeout:
            self._others_from = None
        if not self.drained and silence > _EARLY * self._timeout:
            if self._job.am_i_healthy() and self._job.local_status()['state'] == 'active':
                self._consider(silence)
        elif self.drained and silence <= self._timeout:
            logger.warning('node=%s takes messages again, and keys', self._job.node_name)
            self._job.stand_aside(False)
            self.drained = False
        elif self.drained and self._is_deserted():
            # Those who look at one moment all find another one that is active, and all drain.
            logger.warning(
                'node=%s takes its keys back before it takes messages, as all other nodes have '
                'given away theirs, too',
                self._job.node_name,
            )
            self._job.stand_aside(False)
            self.drained, self._alone = False, True
        if silence <= self._timeout:
            self._alone = False
        # Last: it asks for a connection, which the database may refuse; the agent has one.
        if self._told and silence <= _EARLY * self._timeout:
            self._tell(False)
            self._told = False

    def _consider(self, silence: float) -> None:
        """Say that this node is silent, and drain it when it is time."""
        mine, others = self._look_around()
        if mine is not None and not mine.get('silent'):
            self._told = True  # also where the answer is lost: it is to be taken back
            self._tell(True)
        if not any(node['state'] == 'active' and not node.get('silent') for node in others):
            # Where the broker itself is away, all are silent: each keeps its keys.
            self._others_from = None
            self._keep(silence)
            return
        if self._others_from is None or self._others_from > silence:
            self._others_from = silence
        if silence > self._timeout and silence - self._others_from >= _EARLY * self._timeout:
            logger.warning(
                'node=%s has taken no messages from the broker for %.0f s: it gives its keys away '
                'until it does',
                self._job.node_name,
                silence,
            )
            self._job.stand_aside()
            self.drained = True

    def _look_around(self) -> tuple[NodeInfo | None, list[NodeInfo]]:
        """This node, and those that may have its keys: they share a queue group with it."""
        nodes = {node['name']: node for node in self._job.get_active_nodes()}
        mine = nodes.pop(self._job.node_name, None)
        groups = {*(mine.get('groups', ()) if mine is not None else ())}
        return mine, [
            node for node in nodes.values() if not groups or groups & {*node.get('groups', ())}
        ]

    def _keep(self, silence: float) -> None:
        if silence <= self._timeout:
            return
        if not self._alone:
            logger.warning(
                'node=%s has taken no messages from the broker for %.0f s; it keeps its keys, as '
                'no other node takes any either',
                self._job.node_name,
                silence,
            )
        self._alone = True

    def _is_deserted(self) -> bool:
        """Whether none of the others is active, and it is this one's turn to be so again: one after
        the other, as some may have been drained by an operator.
        """
        _, others = self._look_around()
        states = {node['name']: node['state'] for node in others}
        if 'active' in states.values():
            self._deserted = 0
            return False
        self._deserted += 1
        before = sum(name < self._job.node_name for name in states)
        if self._deserted <= _LOOKS * before:
            return False
        self._deserted = 0
        return True

    def _run(self) -> None:
        while not self._end.wait(min(1.0, self._timeout / 5)):
            try:
                self.look()
            except (
                Exception
            ) as error:  # without this thread a node that is cut off would keep its keys for ever
                more = self._repeats.say(type(error).__name__, clock.now())
                if more is not None:
                    logger.warning(
                        'node=%s cannot look whether it is cut off from the broker: %s%s',
                        self._job.node_name,
                        error,
                        more,
                    )
