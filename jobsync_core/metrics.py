"""A node's state for Prometheus. Needs the extra `metrics`; asks no database, so that a scrape
works while it is away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

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

__all__ = ['JobCollector', 'MessageCollector']

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
