"""Five nodes in five processes against a real PostgreSQL, with faults: no task is ever claimed by
two nodes at once.

Every test ends by leaving the `cluster` block, which reads what all processes answered and fails if
two answers of different processes overlap. That each task finds an owner again is awaited; how fast
is measured by bench/, not here.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jobsync_core import CoordinationConfig
from jobsync_core.embedded.postgres import EmbeddedPostgres
from tests.support.cluster import SAMPLE, Cluster, query
from tests.support.history import moment
from tests.support.proxy import Mode
from tests.support.waiting import eventually

MakeConfig = Callable[..., CoordinationConfig]

FIVE = ('n1', 'n2', 'n3', 'n4', 'n5')
TIMEOUT = 2.0
FAST = {
    'heartbeat_interval_sec': 0.4,
    'heartbeat_timeout_sec': TIMEOUT,
    'rebalance_check_interval_sec': 3,
    'connect_timeout_sec': 2,
    'release_timeout_sec': 2,
}


@pytest.fixture
def cluster(make_config: MakeConfig, tmp_path: Path) -> Iterator[Cluster]:
    with Cluster(make_config(**FAST), tmp_path) as cluster:
        yield cluster


@pytest.fixture
def own_cluster(own_server: EmbeddedPostgres, tmp_path: Path) -> Iterator[Cluster]:
    """Five nodes on a server that the test may break."""
    own_server.create_database('faults')
    with Cluster(own_server.config('faults', **FAST), tmp_path) as cluster:
        cluster.start(*FIVE)
        yield cluster


def wait_silent(cluster: Cluster) -> None:
    """Wait until no node claims anything."""

    def silent() -> bool:
        return cluster.history().unclaimed_since(moment() - 0.2) == list(SAMPLE)

    eventually(silent, timeout=30)


def wait_all_claim(cluster: Cluster, since: float) -> None:
    """Wait until each task is claimed again, and each node claims some."""
    cluster.wait_claimed(since)
    for label in cluster.nodes:
        cluster.wait_claims_of(label, since)


class TestDeath:
    @pytest.mark.parametrize('rank', [0, 1, 3], ids=['leader', 'successor', 'follower'])
    def test_tokens_of_a_killed_node_find_new_owners(self, cluster: Cluster, rank: int) -> None:
        cluster.start(*FIVE)
        victim = cluster.members()[rank]

        since = cluster[victim].kill()

        cluster.wait_claimed(since)
        cluster.wait_balanced()
        assert victim not in cluster.members()

    def test_leader_and_successor_may_die_together(self, cluster: Cluster) -> None:
        cluster.start(*FIVE)
        first, second = cluster.members()[:2]

        cluster[second].kill()
        since = cluster[first].kill()

        cluster.wait_claimed(since)
        cluster.wait_balanced()

    def test_a_killed_node_may_come_back_under_its_name_at_once(self, cluster: Cluster) -> None:
        cluster.start(*FIVE)
        for victim in (cluster.members()[0], cluster.members()[3]):
            since = cluster[victim].kill()
            cluster.launch(victim).wait_event('entered')
            cluster.wait_claimed(since)
        cluster.wait_balanced()

    def test_on_default_settings(self, make_config: MakeConfig, tmp_path: Path) -> None:
        with Cluster(
            make_config(
                heartbeat_interval_sec=5, heartbeat_timeout_sec=15, rebalance_check_interval_sec=30
            ),
            tmp_path,
        ) as cluster:
            cluster.start(*FIVE)
            since = cluster[cluster.members()[0]].kill()
            cluster.wait_claimed(since)
            cluster.wait_balanced()


class TestPause:
    @pytest.mark.parametrize('rank', [0, 3], ids=['leader', 'follower'])
    def test_a_node_paused_beyond_its_lease_comes_back_by_itself(
        self, cluster: Cluster, rank: int
    ) -> None:
        cluster.start(*FIVE)
        victim = cluster.members()[rank]

        cluster[victim].stop()
        cluster.wait_claimed()
        cluster.wait_balanced(set(FIVE) - {victim})
        healed = cluster[victim].cont()

        cluster[victim].wait_event('rebalanced', after=healed)
        cluster.wait_claims_of(victim, healed)
        cluster.wait_balanced()

    def test_a_node_paused_for_less_than_its_lease_keeps_its_tokens(self, cluster: Cluster) -> None:
        cluster.start(*FIVE)
        before = cluster.evictions(), cluster.assignment()

        cluster['n3'].stop()
        paused = moment()
        eventually(lambda: moment() > paused + TIMEOUT / 4)
        healed = cluster['n3'].cont()

        cluster.wait_claims_of('n3', healed)
        assert (cluster.evictions(), cluster.assignment()) == before

    def test_all_nodes_paused_at_once(self, cluster: Cluster) -> None:
        cluster.start(*FIVE)
        for label in FIVE:
            cluster[label].stop()
        paused = moment()
        eventually(lambda: moment() > paused + 1.5 * TIMEOUT)
        healed = [cluster[label].cont() for label in FIVE][-1]
        wait_all_claim(cluster, healed)
        cluster.wait_balanced()


class TestPartition:
    @pytest.mark.parametrize('rank', [0, 3], ids=['leader', 'follower'])
    @pytest.mark.parametrize(
        'mode',
        [Mode.HOLD, Mode.HOLD_TO_SERVER, Mode.HOLD_TO_CLIENT, Mode.SWALLOW, Mode.REFUSE],
        ids=lambda mode: str(mode.name).lower(),
    )
    def test_a_node_cut_off_stops_and_comes_back_after_the_heal(
        self, cluster: Cluster, rank: int, mode: Mode
    ) -> None:
        cluster.start(*FIVE)
        victim = cluster.members()[rank]
        proxy = cluster[victim].proxy

        proxy.switch(mode)
        if mode is Mode.REFUSE:
            proxy.reset()
        cluster.wait_claimed()
        cluster.wait_balanced(set(FIVE) - {victim})
        healed = moment()
        proxy.heal()

        cluster[victim].wait_event('rebalanced', after=healed)
        cluster.wait_claims_of(victim, healed)
        cluster.wait_balanced()

    def test_connections_reset_again_and_again_move_no_token(self, cluster: Cluster) -> None:
        cluster.start(*FIVE)
        before = cluster.evictions(), cluster.assignment()
        for _ in range(3):
            for label in FIVE:
                cluster[label].proxy.reset()
            wait_all_claim(cluster, moment())
        assert (cluster.evictions(), cluster.assignment()) == before

    def test_a_slow_network_loses_nothing(self, cluster: Cluster) -> None:
        cluster.start(*FIVE[:4])
        for label in FIVE[:4]:
            cluster[label].proxy.switch(Mode.DELAY, 0.05)
        cluster.launch('n5').wait_event('entered')
        cluster.wait_balanced()
        cluster['n2'].leave()
        cluster.wait_balanced()
        cluster.wait_claimed()

    def test_the_leader_cut_off_while_a_node_joins(self, cluster: Cluster) -> None:
        cluster.start(*FIVE[:4])
        leader = cluster.members()[0]
        joiner = cluster.launch('n5')
        joiner.wait_event('constructed')
        cluster[leader].proxy.switch(Mode.HOLD)
        joiner.wait_event('entered')
        cluster.wait_claimed()
        cluster[leader].proxy.heal()
        cluster.wait_balanced()


class TestDatabase:
    def test_a_crash_and_restart_moves_no_token(
        self, own_cluster: Cluster, own_server: EmbeddedPostgres
    ) -> None:
        before = own_cluster.evictions(), own_cluster.assignment()
        own_server.kill()
        own_server.start()
        wait_all_claim(own_cluster, moment())
        assert (own_cluster.evictions(), own_cluster.assignment()) == before

    def test_a_pause_longer_than_the_timeout_moves_no_token(
        self, own_cluster: Cluster, own_server: EmbeddedPostgres
    ) -> None:
        before = own_cluster.evictions(), own_cluster.assignment()
        own_server.pause()
        try:
            paused = moment()
            wait_silent(own_cluster)
            eventually(lambda: moment() > paused + 2 * TIMEOUT)
        finally:
            own_server.resume()
        wait_all_claim(own_cluster, moment())
        assert (own_cluster.evictions(), own_cluster.assignment()) == before

    def test_an_outage_longer_than_the_timeout_moves_no_token(
        self, own_cluster: Cluster, own_server: EmbeddedPostgres
    ) -> None:
        before = own_cluster.evictions(), own_cluster.assignment()
        own_server.kill()
        crashed = moment()
        wait_silent(own_cluster)
        eventually(lambda: moment() > crashed + 2 * TIMEOUT)
        own_server.start()
        wait_all_claim(own_cluster, moment())
        assert (own_cluster.evictions(), own_cluster.assignment()) == before

    def test_a_node_that_dies_during_an_outage_is_replaced_after_it(
        self, own_cluster: Cluster, own_server: EmbeddedPostgres
    ) -> None:
        leader = own_cluster.members()[0]
        own_server.kill()
        wait_silent(own_cluster)
        own_cluster[leader].kill()
        own_server.start()
        own_cluster.wait_claimed()
        own_cluster.wait_balanced(set(FIVE) - {leader})


class TestWallClocks:
    def test_nodes_whose_clocks_are_a_minute_wrong_each_way(self, cluster: Cluster) -> None:
        cluster.launch('n1', clock_offset=60.0)
        cluster.launch('n2', clock_offset=-60.0)
        cluster.start('n3', 'n4', 'n5')
        leader = cluster.members()[0]
        since = cluster[leader].kill()
        cluster.wait_claimed(since)
        cluster.wait_balanced()

    def test_the_servers_clock_jumps_a_minute_each_way(
        self, tmp_path: Path, wrong_clock: tuple[Path, Path]
    ) -> None:
        bin_dir, offset = wrong_clock
        with EmbeddedPostgres(bin_dir=bin_dir, settings={'fsync': 'off'}) as server:
            server.create_database('clock')
            with Cluster(server.config('clock', **FAST), tmp_path) as cluster:
                cluster.start(*FIVE)
                before = cluster.evictions(), cluster.assignment()
                for seconds in (60, -60, 0):
                    true_time = query(
                        cluster.config, 'SELECT extract(epoch FROM clock_timestamp())'
                    )[0][0]
                    offset.write_text(str(seconds))
                    jumped = query(cluster.config, 'SELECT extract(epoch FROM clock_timestamp())')[
                        0
                    ][0]
                    assert abs(jumped - true_time) > 50, 'the clock did not jump'
                    since = moment()
                    eventually(lambda since=since: moment() > since + 1.5 * TIMEOUT)  # type: ignore[misc]
                    wait_all_claim(cluster, moment())
                    assert (cluster.evictions(), cluster.assignment()) == before
                offset.write_text('-60')
                since = cluster[cluster.members()[0]].kill()
                cluster.wait_claimed(since)
                cluster.wait_balanced()


class TestOrdinaryLife:
    def test_join_and_leave(self, cluster: Cluster) -> None:
        cluster.start(*FIVE[:3])
        cluster.start('n4', 'n5')
        cluster.wait_claimed(cluster['n1'].leave())
        cluster.wait_balanced()
        cluster.wait_claimed(cluster['n4'].leave())
        cluster.wait_balanced()

    def test_rolling_restart(self, cluster: Cluster) -> None:
        cluster.start(*FIVE)
        for label in FIVE:
            since = cluster[label].leave()
            cluster.launch(label).wait_event('entered')
            cluster.wait_claimed(since)
        cluster.wait_balanced()

    def test_all_restart_at_once(self, cluster: Cluster) -> None:
        cluster.start(*FIVE)
        for label in FIVE:
            cluster[label].send('leave')
        for label in FIVE:
            assert cluster[label].process.wait(30) == 0, cluster[label].report()
        cluster.start(*FIVE)

    def test_a_second_process_of_one_name_is_refused_and_the_first_goes_on(
        self, cluster: Cluster
    ) -> None:
        cluster.start(*FIVE)
        before = cluster.evictions(), cluster.assignment()
        first = cluster['n2']
        second = cluster.launch('twin', name='n2')
        failure = second.wait_event('failed')
        assert failure['error'] == 'DuplicateNodeName'
        assert "'n2'" in failure['message'] and str(first.pid) in failure['message']
        assert second.process.wait(30) == 1
        assert (cluster.evictions(), cluster.assignment()) == before
        cluster.wait_claims_of('n2', moment())

    def test_drain_gives_all_away_and_undrain_takes_part_again(self, cluster: Cluster) -> None:
        cluster.start(*FIVE)
        for label in (cluster.members()[0], cluster.members()[4]):
            cluster[label].command('drain', 'drained')
            since = moment()
            cluster.wait_claimed(since)
            cluster.wait_balanced(set(FIVE) - {label})
            assert label in cluster.members()
            assert not cluster.history().claimed_by(cluster[label].label, since)
            cluster[label].command('undrain', 'undrained')
            cluster.wait_balanced()

    def test_hand_over_waits_for_on_release(self, cluster: Cluster) -> None:
        cluster.start(*FIVE[:2], on_release=True)
        joined = moment()
        cluster.start('n3', on_release=True)
        for label in FIVE[:2]:
            assert cluster[label].wait_event('released', after=joined)['tokens'] > 0

    def test_a_storm_of_faults(self, cluster: Cluster) -> None:
        """Several at once: a kill, a pause, a partition, a join and a drain, all healed in the
        end.
        """
        cluster.start(*FIVE)
        members = cluster.members()
        cluster[members[0]].proxy.switch(Mode.HOLD)
        cluster[members[1]].stop()
        cluster[members[2]].kill()
        cluster.launch('n6')
        cluster[members[3]].send('drain')
        cluster.wait_claimed()
        cluster[members[0]].proxy.heal()
        cluster[members[1]].cont()
        cluster[members[3]].wait_event('drained')
        cluster[members[3]].send('undrain')
        cluster.wait_balanced()
        cluster.wait_claimed()


CLOCK_SOURCE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static long offset(void) {
    char text[32] = {0};
    const char *path = getenv("JOBSYNC_TEST_CLOCK");
    int file = path ? open(path, O_RDONLY) : -1;
    if (file < 0) return 0;
    if (read(file, text, sizeof text - 1) < 0) text[0] = 0;
    close(file);
    return atol(text);
}

int clock_gettime(clockid_t id, struct timespec *at) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int result = real(id, at);
    if (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE) at->tv_sec += offset();
    return result;
}

int gettimeofday(struct timeval *restrict at, void *restrict zone) {
    struct timespec now;
    (void) zone;
    int result = clock_gettime(CLOCK_REALTIME, &now);
    at->tv_sec = now.tv_sec;
    at->tv_usec = now.tv_nsec / 1000;
    return result;
}

time_t time(time_t *at) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (at) *at = now.tv_sec;
    return now.tv_sec;
}
"""


@pytest.fixture
def wrong_clock() -> Iterator[tuple[Path, Path]]:
    """A directory of server binaries whose wall clocks are wrong by the seconds written in a file,
    and that file.
    """
    compiler = shutil.which('cc') or shutil.which('gcc')
    if compiler is None:
        pytest.skip('the server cannot be given a wrong clock: no C compiler here')
    real = EmbeddedPostgres(bin_dir=os.environ.get('JOBSYNC_TEST_PG_BIN')).bin_dir
    directory = Path(tempfile.mkdtemp(prefix='wrong-clock-'))
    directory.chmod(0o755)  # the server may run as another user
    source, library, offset = directory / 'clock.c', directory / 'clock.so', directory / 'offset'
    source.write_text(CLOCK_SOURCE)
    offset.write_text('0')
    subprocess.run(
        [compiler, '-shared', '-fPIC', '-O1', '-o', str(library), str(source), '-ldl'], check=True
    )
    for program in ('postgres', 'initdb'):
        script = directory / program
        clock = (
            f'JOBSYNC_TEST_CLOCK={offset} LD_PRELOAD={library} ' if program == 'postgres' else ''
        )
        script.write_text(f'#!/bin/sh\n{clock}exec {real / program} "$@"\n')
        script.chmod(0o755)
    yield directory, offset
    shutil.rmtree(directory)
