"""The broker, the database, or the network between them and a worker goes away: nothing is lost,
nothing is completed twice.
"""

from __future__ import annotations

import signal
from collections.abc import Callable

import pytest

from jobsync_core.embedded.postgres import EmbeddedPostgres
from tests.support.cluster import query
from tests.support.proxy import Mode, Proxy
from tests.support.waiting import eventually

from .harness import STEADY, Cluster
from .history import moment
from .setups import Setup, setups

on_processes = pytest.mark.parametrize('setup', setups('processes'), ids=str)
on_threads = pytest.mark.parametrize('setup', setups('threads'), ids=str)
MakeCluster = Callable[..., Cluster]


def send_some(cluster: Cluster, count: int, start: int = 0, sleep: float = 0.1) -> None:
    for n in range(start, start + count):
        cluster.send('keyed' if n % 2 else 'body', n, sleep, routed=n % 3 == 0)


@on_processes
def test_a_broker_connection_that_breaks_while_tasks_run_costs_nothing(
    setup: Setup, make_cluster: MakeCluster
) -> None:
    cluster = make_cluster(setup, STEADY)
    server = cluster.place.server
    with Proxy('127.0.0.1', server.port) as proxy:
        cluster.launch('alpha', broker=server.url(cluster.place.space, proxy.port), concurrency=2)
        cluster.start('beta', concurrency=2)
        before = cluster.ledger.incarnations()
        send_some(cluster, 60, sleep=0.3)
        for _ in range(3):
            cluster.wait_progress(len(cluster.ended()) + 5)
            proxy.reset()
        cluster.finish()
        # A reconnect is no reason to leave.
        assert cluster.ledger.incarnations() == before
        assert all(worker.is_running() for worker in cluster.workers.values())


@on_threads
def test_a_broker_that_one_worker_cannot_reach_for_a_while_costs_nothing(
    setup: Setup, make_cluster: MakeCluster
) -> None:
    cluster = make_cluster(setup)
    server = cluster.place.server
    with Proxy('127.0.0.1', server.port) as proxy:
        cluster.launch('alpha', broker=server.url(cluster.place.space, proxy.port), concurrency=2)
        cluster.start('beta', concurrency=2)
        send_some(cluster, 40)
        cluster.wait_progress(5)
        proxy.switch(Mode.REFUSE)
        proxy.reset()
        since = moment()
        eventually(lambda: moment() - since > 4)
        proxy.heal()
        cluster.finish()


@pytest.mark.parametrize('how', [signal.SIGTERM, signal.SIGKILL], ids=['SIGTERM', 'SIGKILL'])
@on_processes
def test_a_broker_that_restarts_loses_and_doubles_nothing(
    setup: Setup, make_cluster: MakeCluster, how: signal.Signals
) -> None:
    cluster = make_cluster(setup, own=True)
    cluster.start('alpha', 'beta', concurrency=2)
    send_some(cluster, 60)
    cluster.wait_progress(10)
    cluster.place.server.restart(how)
    send_some(cluster, 30, start=60)
    cluster.finish(60)
    assert all(worker.is_running() for worker in cluster.workers.values())


@on_processes
def test_a_database_that_restarts_costs_nothing(
    setup: Setup, make_cluster: MakeCluster, own_server: EmbeddedPostgres
) -> None:
    cluster = make_cluster(setup, postgres=own_server)
    cluster.start('alpha', 'beta', concurrency=2)
    send_some(cluster, 60)
    cluster.wait_progress(10)
    own_server.restart()
    cluster.finish(60)
    assert all(worker.is_running() for worker in cluster.workers.values())


@on_threads
def test_without_a_database_nothing_runs_and_nothing_is_lost(
    setup: Setup, make_cluster: MakeCluster, own_server: EmbeddedPostgres
) -> None:
    cluster = make_cluster(setup, postgres=own_server)
    cluster.start('alpha', 'beta', concurrency=2)
    send_some(cluster, 30)
    cluster.wait_progress(5)
    own_server.pause()
    lost = moment()
    # Longer than any lease, and than it takes a busy machine from a claim to the task's first line.
    eventually(lambda: moment() - lost > 5)
    for n in range(100, 120):
        cluster.send('body', n)
    eventually(lambda: moment() - lost > 7)
    resumed = moment()
    own_server.resume()
    cluster.finish(60)
    assert all(worker.is_running() for worker in cluster.workers.values())
    begun = [note for note in cluster.notes.of('start') if lost + 4 < note.at < resumed]
    assert not begun, f'begun without a lease: {begun[:5]}'


@on_threads
def test_a_worker_cut_off_from_the_database_stops_and_comes_back(
    setup: Setup, make_cluster: MakeCluster
) -> None:
    cluster = make_cluster(setup)
    config = cluster.place.config
    with Proxy(config.host, int(config.port)) as proxy:
        url = f'postgresql://{config.user}:{config.password}@127.0.0.1:{proxy.port}/{config.dbname}'
        cluster.launch('alpha', database=url, concurrency=2)
        cluster.start('beta', concurrency=2)
        send_some(cluster, 40)
        cluster.wait_progress(5)
        proxy.switch(Mode.HOLD)
        cut = moment()
        eventually(lambda: cluster.owning() == {'beta'}, 20)
        send_some(cluster, 20, start=100)
        cluster.wait_ended({item.key for item in cluster.sent})
        assert not [
            note
            for note in cluster.notes.of('start')
            if cluster.worker_of(note.node) == 'alpha' and note.at > cut + 4
        ]
        proxy.heal()
        cluster.settle()
        send_some(cluster, 20, start=200, sleep=0)
        cluster.finish()
        assert [
            note
            for note in cluster.notes.of('end')
            if cluster.worker_of(note.node) == 'alpha' and int(note.key[2:]) >= 200
        ]


# Raises in the begin of an execution, as a server does that is out of disk space.
_REFUSING = """
CREATE TABLE trouble (code text);
CREATE SEQUENCE refused_begins;
CREATE FUNCTION raise_trouble() RETURNS trigger LANGUAGE plpgsql SET search_path = public AS $$
DECLARE wanted text;
BEGIN
    SELECT code INTO wanted FROM trouble;
    -- no rollback takes back what a sequence gave
    IF wanted IS NOT NULL AND TG_OP = 'INSERT' THEN PERFORM nextval('refused_begins'); END IF;
    IF wanted IS NOT NULL THEN RAISE EXCEPTION 'no space left' USING ERRCODE = wanted; END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER raise_trouble BEFORE INSERT OR UPDATE ON "{}execution"
    FOR EACH ROW EXECUTE FUNCTION raise_trouble();
"""


@pytest.mark.parametrize('code', ['53100', '22P05'])
@on_threads
def test_a_server_that_refuses_for_a_while_loses_and_doubles_nothing(
    setup: Setup, make_cluster: MakeCluster, code: str
) -> None:
    """No message is acknowledged that has not run, and what ran meanwhile is recorded later."""
    cluster = make_cluster(setup)
    cluster.start('alpha', concurrency=2)
    send_some(cluster, 10, sleep=0.5)
    cluster.wait_progress(1)
    query(cluster.ledger.config, _REFUSING)
    query(cluster.ledger.config, f"INSERT INTO trouble VALUES ('{code}')")
    send_some(cluster, 10, start=10)
    since = moment()
    eventually(lambda: moment() - since > 4)
    query(cluster.ledger.config, 'DELETE FROM trouble')
    cluster.finish(60)


@pytest.mark.parametrize('setup', setups('processes', brokers=('redis',)), ids=str)
def test_workers_pause_while_a_server_refuses(setup: Setup, make_cluster: MakeCluster) -> None:
    """They do not take every message, fail to begin it, and send it back: what a child of the pool
    hears counts for its worker.
    """
    cluster = make_cluster(setup)
    cluster.start('alpha', concurrency=2)
    cluster.send('body', 0)
    cluster.wait_ended({'b:0'})
    query(cluster.ledger.config, _REFUSING)
    query(cluster.ledger.config, "INSERT INTO trouble VALUES ('53100')")
    for n in range(1, 61):
        cluster.send('body', n)
    since = moment()
    eventually(lambda: moment() - since > 8)
    # For each node two or so when it begins, and one that tries after the first pause, of 5 s.
    nodes = cluster.workers['alpha'].nodes
    begins = query(cluster.ledger.config, 'SELECT last_value FROM refused_begins')[0][0]
    assert 2 <= begins <= 6 * nodes, f'{begins} begins were refused'
    query(cluster.ledger.config, 'DELETE FROM trouble')
    cluster.wait_ended({f'b:{n}' for n in range(1, 61)})
    assert all(worker.is_running() for worker in cluster.workers.values())
    eventually(lambda: 'the database begins work again' in cluster.workers['alpha'].log(), 30)
    log = cluster.workers['alpha'].log()
    assert 1 <= log.count('the database refuses to begin anything') <= nodes  # once each
    assert 'no space left' in log
