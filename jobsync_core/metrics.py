"""A node's state for Prometheus. Needs the extra `metrics`; asks no database, so that a scrape
works while it is away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

try:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
    from prometheus_client.registry import Collector
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f'jobsync_core.metrics: {error.name} is missing; install it with: pip install '
        "'jobsync-workers[metrics]'",
        name=error.name,
    ) from error

from .job import Job

__all__ = ['BacklogCollector', 'JobCollector', 'MessageCollector']

#: Key of Job.local_status, name of the metric, what it is.
_GAUGES = (
    ('healthy', 'jobsync_healthy', '1 while this node holds a valid lease'),
    ('is_leader', 'jobsync_leader', '1 while this node leads'),
    ('my_tokens', 'jobsync_tokens', 'Tokens that this node may claim now'),
    ('total_tokens', 'jobsync_total_tokens', 'Tokens of the cluster'),
    ('token_version', 'jobsync_token_version', 'Version of the assignment that this node has seen'),
    (
        'lease_remaining_sec',
        'jobsync_lease_remaining_seconds',
        'Time until the lease runs out unless a heartbeat extends it',
    ),
    (
        'executions_unsettled',
        'jobsync_executions_unsettled',
        'Executions of this process whose end the database has not recorded yet',
    ),
)
_COUNTERS = (
    ('evictions', 'jobsync_evictions', 'Times that this node was taken for dead and came back'),
    (
        'callback_failures',
        'jobsync_callback_failures',
        'Calls of on_rebalance and on_release that raised',
    ),
    (
        'callbacks_slow',
        'jobsync_callbacks_slow',
        'Calls of on_rebalance and on_release that took longer than a second',
    ),
)
#: Attribute of a queue's backlog, name of the metric, what it is.
_BACKLOG = (
    ('ready', 'jobsync_backlog_ready', 'Messages in a queue, and in those that nodes have for it'),
    ('parked', 'jobsync_backlog_parked', 'Messages of a queue that no live node may take'),
    (
        'unacknowledged',
        'jobsync_backlog_unacknowledged',
        'Messages of a queue that workers have taken, where the broker tells',
    ),
    (
        'delayed',
        'jobsync_backlog_delayed',
        'Messages of a queue that wait for their time, where the broker tells',
    ),
    (
        'oldest_sec',
        'jobsync_backlog_oldest_seconds',
        'Age of the message of a queue that is next, where the broker tells',
    ),
)


class Waiting(Protocol):
    """What waits for one queue: an attribute for each of the gauges; None is not shown."""

    @property
    def queue(self) -> str: ...


class JobCollector(Collector):
    """Metrics `jobsync_*` with the label `node`: `REGISTRY.register(JobCollector(job))`.

    Args:
        job: A Job; in single-node mode it has no metrics.
    """

    def __init__(self, job: Job) -> None:
        self._job = job

    def collect(self) -> Iterator[Metric]:
        """Called at each scrape."""
        status: Mapping[str, Any] = self._job.local_status()
        if not status['coordination_enabled']:
            return
        for kind, rows in ((GaugeMetricFamily, _GAUGES), (CounterMetricFamily, _COUNTERS)):
            for key, name, text in rows:
                family = kind(name, text, labels=['node'])
                family.add_metric([self._job.node_name], float(status[key]))
                yield family
        family = GaugeMetricFamily(
            'jobsync_group_tokens',
            'Tokens of a queue group that this node may claim now',
            labels=['node', 'queue_group'],
        )
        for group, tokens in status.get('groups', {}).items():
            family.add_metric([self._job.node_name, group], tokens)
        yield family


class MessageCollector(Collector):
    """Counters of a queue adapter: `jobsync_messages_total` with the labels `node` and `event`.

    Args:
        node: The node's name.
        counts: Gives the counters by event.
    """

    def __init__(self, node: str, counts: Callable[[], Mapping[str, int]]) -> None:
        self._node = node
        self._counts = counts

    def collect(self) -> Iterator[Metric]:
        """Called at each scrape."""
        family = CounterMetricFamily(
            'jobsync_messages', 'Messages at the gate of this node', labels=['node', 'event']
        )
        for event, number in sorted(self._counts().items()):
            family.add_metric([self._node, event], number)
        yield family


class BacklogCollector(Collector):
    """Gauges `jobsync_backlog_*` with the label `queue`, which is the queue that messages were
    sent to.

    Args:
        latest: Gives the numbers that are known, without asking anybody.
    """

    def __init__(self, latest: Callable[[], Iterable[Waiting]]) -> None:
        self._latest = latest

    def collect(self) -> Iterator[Metric]:
        """Called at each scrape."""
        waiting = list(self._latest())
        for name, metric, text in _BACKLOG:
            family = GaugeMetricFamily(metric, text, labels=['queue'])
            for each in waiting:
                value = getattr(each, name)
                if value is not None:
                    family.add_metric([each.queue], value)
            yield family
