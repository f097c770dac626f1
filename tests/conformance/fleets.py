"""A cluster whose workers do not all consume the same queues."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from jobsync_core.assignment.hashing import task_to_token
from tests.support.cluster import query
from tests.support.waiting import eventually

from .harness import Cluster
from .history import moment

__all__ = ['FIRST', 'SECOND', 'Fleet']

#: The queue that the framework itself has, and another one.
FIRST, SECOND = 'first', 'second'
_NAMES = {'celery': 'celery', 'dramatiq': 'default'}
#: Tasks whose home is the second queue; of Dramatiq's actors it is said where they are declared.
_OF_SECOND = ('body', 'flaky')
#: First letters of their keys.
_LETTERS_OF_SECOND = frozenset('bf')
_FOREVER = float('inf')


class Fleet:
    """Workers of one cluster. What the name of a worker begins with says which queues it consumes:
    'first', 'second' or 'both'.

    Args:
        cluster: The cluster.
    """

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        #: When each worker consumed which queue.
        self._spans: dict[tuple[str, str], list[tuple[float, float]]] = {}

    def name_of(self, queue: str) -> str:
        """A queue's name at the broker."""
        return _NAMES[self.cluster.adapter.framework] if queue == FIRST else queue

    def queue_of(self, key: str) -> str:
        """The home queue of a key's messages."""
        return SECOND if key[0] in _LETTERS_OF_SECOND else FIRST

    def start(self, *names: str, settle: bool = True, **options: Any) -> None:
        """Start workers at once; wait until all are ready and own their shares."""
        for name in names:
            kind = name.partition('-')[0]
            queues = [FIRST, SECOND] if kind == 'both' else [kind]
            for queue in queues:
                self.begins(name, queue)
            named = [self.name_of(queue) for queue in queues]
            words = [','.join(named)] if self.cluster.adapter.framework == 'celery' else named
            self.cluster.launch(name, options=['-Q', *words], **options)
        for name in names:
            self.cluster[name].wait_ready()
        if settle:
            self.settle()

    def begins(self, worker: str, queue: str) -> None:
        """A worker consumes a queue from now on."""
        self._spans.setdefault((worker, queue), []).append((moment(), _FOREVER))

    def ends(self, worker: str, queue: str) -> None:
        """A worker has consumed a queue until now."""
        since, _ = self._spans[worker, queue][-1]
        self._spans[worker, queue][-1] = since, moment()

    def consumers(self, queue: str) -> set[str]:
        """Names of the workers that run and consume a queue."""
        now = moment()
        return {
            worker
            for (worker, each), spans in self._spans.items()
            if each == queue
            and self.cluster[worker].is_running()
            and any(since <= now <= until for since, until in spans)
        }

    def send(self, task: str, n: int, *args: Any, **options: Any) -> str:
        """Send a message to the home queue of its task."""
        if task in _OF_SECOND and self.cluster.adapter.framework == 'celery':
            options['queue'] = SECOND
        return self.cluster.send(task, n, *args, **options)

    def shares(self) -> dict[str, dict[str, int]]:
        """Numbers of tokens by queue and node."""
        found: dict[str, dict[str, int]] = {}
        for name, node, count in query(
            self.cluster.place.config,
            'SELECT g.name, r.node, sum(upper(r.tokens) - lower(r.tokens)) FROM "{}ring" AS r '
            'JOIN "{}queue_group" AS g ON g.id = lower(r.tokens) >> 20 '
            'WHERE r.node IS NOT NULL GROUP BY 1, 2',
        ):
            queue = SECOND if name == SECOND else FIRST
            found.setdefault(queue, {})[node] = int(count)
        return found

    def settle(self, timeout: float = 30.0) -> None:
        """Wait until exactly the consumers of each queue own its keys, in equal shares."""
        cluster = self.cluster
        total = cluster.place.config.total_tokens
        wanted = {
            queue: {worker: cluster[worker].nodes for worker in found}
            for queue in (FIRST, SECOND)
            if (found := self.consumers(queue))
        }

        def settled() -> bool:
            shares = self.shares()
            return {
                queue: Counter(map(cluster.worker_of, nodes)) for queue, nodes in shares.items()
            } == wanted and all(
                sum(nodes.values()) == total and max(nodes.values()) - min(nodes.values()) <= 1
                for nodes in shares.values()
            )

        eventually(settled, timeout)

    def owners(self, keys: Iterable[str]) -> dict[str, str | None]:
        """Who owns each key now, in the group of its home queue."""
        config = self.cluster.place.config
        rows = query(
            config,
            'SELECT g.name, g.id, lower(r.tokens), upper(r.tokens), r.node FROM "{}ring" AS r '
            'JOIN "{}queue_group" AS g ON g.id = lower(r.tokens) >> 20',
        )
        found: dict[str, str | None] = {}
        for key in keys:
            name = self.name_of(self.queue_of(key))
            token = task_to_token(key, config.total_tokens, config.hash_function)
            found[key] = next(
                (
                    node
                    for group, number, low, high, node in rows
                    if group == name and low <= (number << 20) + token < high
                ),
                None,
            )
        return found

    def check_owners(self, letters: str = 'kbfr') -> None:
        """Every key ran on the node that owns it in its queue's group: where no node came or
        went.
        """
        ends = [note for note in self.cluster.notes.of('end') if note.key[0] in letters]
        owners = self.owners({note.key for note in ends})
        wrong = {
            note.key: (note.node, owners[note.key])
            for note in ends
            if owners[note.key] != note.node
        }
        assert not wrong, f'{len(wrong)} of {len(ends)} ran elsewhere: {wrong}'

    def finish(self, timeout: float = 60.0) -> None:
        """As the cluster's; and every run was on a worker that consumed its queue then."""
        self.cluster.finish(timeout)
        self.check_consumers()

    def check_consumers(self) -> None:
        """Every run was on a worker that consumed its queue then."""
        wrong = []
        for note in self.cluster.notes.of('start'):
            worker = self.cluster.worker_of(note.node) or ''
            spans = self._spans.get((worker, self.queue_of(note.key)), [])
            if not any(since <= note.at <= until for since, until in spans):
                wrong.append((note.key, worker))
        assert not wrong, (
            f'{len(wrong)} of {len(self.cluster.notes.of("start"))} ran on a worker that does not '
            f'consume their queue: {wrong[:10]}'
        )
