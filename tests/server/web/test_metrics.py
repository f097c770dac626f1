"""A node's state as Prometheus scrapes it."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, generate_latest

from jobsync_core import CoordinationConfig, Job
from jobsync_core.embedded.postgres import EmbeddedPostgres
from jobsync_core.metrics import JobCollector
from tests.support.waiting import eventually


def test_a_scrape_shows_the_node(config: CoordinationConfig) -> None:
    registry = CollectorRegistry()
    with Job('n1', config, wait_on_enter=0) as job:
        registry.register(JobCollector(job))
        for name, value in (
            ('healthy', 1.0),
            ('leader', 1.0),
            ('tokens', 10_000.0),
            ('total_tokens', 10_000.0),
            ('evictions_total', 0.0),
        ):
            assert registry.get_sample_value(f'jobsync_{name}', {'node': 'n1'}) == value, name
    assert registry.get_sample_value('jobsync_healthy', {'node': 'n1'}) == 0.0
    assert registry.get_sample_value('jobsync_tokens', {'node': 'n1'}) == 0.0


def test_a_scrape_shows_the_tokens_of_each_queue_group(config: CoordinationConfig) -> None:
    registry = CollectorRegistry()
    labels = {'node': 'n1', 'queue_group': 'mail'}
    with Job('n1', config, wait_on_enter=0, groups=['mail']) as job:
        registry.register(JobCollector(job))
        eventually(
            lambda: registry.get_sample_value('jobsync_group_tokens', labels) == 10_000.0, 30
        )


def test_a_scrape_works_while_the_database_is_away(own_server: EmbeddedPostgres) -> None:
    own_server.create_database('metrics')
    config = own_server.config(
        'metrics', heartbeat_interval_sec=0.2, heartbeat_timeout_sec=1.0, connect_timeout_sec=1
    )
    registry = CollectorRegistry()
    with Job('n1', config, wait_on_enter=0) as job:
        registry.register(JobCollector(job))
        own_server.kill()
        eventually(lambda: registry.get_sample_value('jobsync_healthy', {'node': 'n1'}) == 0.0)
        own_server.restart()
        eventually(lambda: registry.get_sample_value('jobsync_healthy', {'node': 'n1'}) == 1.0)


def test_single_node_mode_has_no_metrics() -> None:
    registry = CollectorRegistry()
    with Job('alone') as job:
        registry.register(JobCollector(job))
        assert generate_latest(registry) == b''
