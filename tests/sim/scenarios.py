"""Families of schedules: which faults happen when, drawn from a seed.

Each family is a function that builds a World and plans its faults; `run(seed)` plays one schedule
to its end: faults, then calm until the cluster is whole (I3), then a quiet time in which nothing
may be written (I4).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from jobsync_core.protocol.messages.leadership import Evict, Lead, Observe
from jobsync_core.protocol.node import Phase, Settings

from .beginnings import have_groups, some_duration, some_times, start_cluster
from .group_scenarios import belated, deserted, enrolling, erased, forgotten, renamed, upgrades
from .invariants import Violation
from .node import LEASE_FRACTION, SimNode
from .schedule import TIMEOUT, Run
from .store import SimStore
from .world import World

__all__ = ['FAMILIES', 'Run', 'play', 'run']


def pauses(run: Run) -> None:
    """Processes stop and go on, now and then with a request under way."""
    start = start_cluster(run)
    run.world.network.slow = run.world.rng.choice((0.0, 0.2))
    for time in some_times(run, start, 3 * TIMEOUT, 4):
        run.at(time, run.pause, some_duration(run))
    run.faults_end += 3 * TIMEOUT


def partitions(run: Run) -> None:
    """Links fail, both ways or one way, and come back; some are slow."""
    start = start_cluster(run)
    run.world.network.slow = run.world.rng.choice((0.0, 0.2))
    for time in some_times(run, start, 3 * TIMEOUT, 4):
        run.at(time, run.cut, some_duration(run), run.world.rng.choice(('both', 'up', 'down')))
    run.faults_end += 3 * TIMEOUT


def crashes(run: Run) -> None:
    """Processes die; most come back under their name, on the same machine or another."""
    start = start_cluster(run)
    rng = run.world.rng
    for time in some_times(run, start, 3 * TIMEOUT, 4):
        run.at(time, run.crash, None, rng.choice((None, 0.05, rng.random() * 2 * TIMEOUT)))
    run.faults_end += 2 * TIMEOUT


def rolling(run: Run) -> None:
    """Joins, leaves and restarts, one after another."""
    start = start_cluster(run)
    rng = run.world.rng
    for time in some_times(run, start, 2.66667 * TIMEOUT, 5):
        run.at(time, run.leave, None, rng.choice((None, 0.05, rng.random() * 2)))
    for index, time in enumerate(some_times(run, start, 2.66667 * TIMEOUT, 2, 0)):
        run.names.append(f'm{index}')
        run.at(time, run.spawn, f'm{index}')
    run.faults_end += 2


def outages(run: Run) -> None:
    """The database restarts or hangs, for any length; no node is to blame for it."""
    run.keeps = True
    start = start_cluster(run)
    rng = run.world.rng
    for time in some_times(run, start, 3 * TIMEOUT, 2):
        run.at(
            time,
            rng.choice((run.restart_server, run.restart_server, run.freeze_server)),
            some_duration(run),
        )
    run.faults_end += 3 * TIMEOUT


def lossy(run: Run) -> None:
    """Slow and lost replies, statements carried out late, notifications that never come."""
    start = start_cluster(run)
    rng, network = run.world.rng, run.world.network
    network.slow, network.lost_reply, network.late = (
        rng.random() * 0.1,
        rng.random() * 0.05,
        rng.random() * 0.05,
    )
    network.lost_notification = rng.choice((0.0, 0.3, 1.0))
    for time in some_times(run, start, 3 * TIMEOUT, 3):
        run.at(time, rng.choice((run.deafen, run.leave, run.crash)))
    run.faults_end += 2


def locks(run: Run) -> None:
    """Locks come, expire and go while nodes come and go."""
    start = start_cluster(run)
    rng = run.world.rng
    for time in some_times(run, start * 0.3, 3 * TIMEOUT, 12, 3):
        run.at(time, run.change_locks)
    for time in some_times(run, start, 2.66667 * TIMEOUT, 2, 0):
        run.at(time, rng.choice((run.leave, run.crash)), None, 1.0)
    run.at(start + 4 * TIMEOUT, run.expire_locks)


def drains(run: Run) -> None:
    """Nodes are drained by their users, by themselves and by an operator."""
    start = start_cluster(run)
    rng = run.world.rng
    for time in some_times(run, start, 2.66667 * TIMEOUT, 6):
        run.at(time, run.drain, rng.choice(('node', 'itself', 'operator')), rng.random() < 0.7)
    for time in some_times(run, start, 2.66667 * TIMEOUT, 2, 0):
        run.at(time, rng.choice((run.leave, run.crash)), None, 1.0)
    run.at(start + 3 * TIMEOUT, run.undrain_all)


def names(run: Run) -> None:
    """Two processes of one name, one of them paused, cut off or alive."""
    start = start_cluster(run)
    rng = run.world.rng
    for time in some_times(run, start, 2 * TIMEOUT, 2):
        name = rng.choice(run.names)
        run.at(
            time,
            rng.choice((run.pause, lambda seconds, name: run.cut(seconds, 'both', name))),
            some_duration(run),
            name,
        )
        run.at(time + rng.random(), run.spawn, name)
    run.faults_end += 3 * TIMEOUT


def failovers(run: Run) -> None:
    """A standby that lacks the last writes is promoted, old leases still running."""
    start = start_cluster(run)
    rng = run.world.rng
    standby: list[SimStore] = []
    for time in some_times(run, start, 1.33333 * TIMEOUT, 3, 0):
        run.at(time, rng.choice((run.leave, run.crash)), None, None)
    moment = start + rng.random() * 2 * TIMEOUT
    run.at(moment, run.remember, standby)
    for index in range(rng.choice((0, 1, 2))):
        run.at(max(0.0, moment - 2 + rng.random() * 2.5), run.spawn, f'm{index}')
    run.at(moment + rng.random() * 1.5, run.fail_over, standby, rng.random() * 2)
    for time in some_times(run, moment, TIMEOUT, 2, 0):
        run.at(time, run.pause, some_duration(run))
    run.faults_end += 3 * TIMEOUT


def single(run: Run) -> None:
    """One fault in a whole cluster, and the time that it may cost."""
    rng = run.world.rng
    start = start_cluster(run, rng.choice((3, 4, 5))) + run.settings.timeout
    slack = run.settings.poll + 0.25
    kind = rng.choice(
        ('kill', 'leave', 'join', 'pause', 'cut', 'outage', 'lock', 'drain', 'enroll', 'withdraw')
    )
    run.faults_end = start
    if kind == 'kill':
        run.bound = TIMEOUT * 1.01 + slack
        run.at(start, run.crash)
    elif kind == 'leave':
        run.bound = run.settings.release_timeout + slack
        run.at(start, run.leave)
    elif kind == 'join':
        run.bound = run.settings.wait_on_enter + run.settings.release_timeout + slack
        run.names.append('late')
        run.at(start, run.spawn, 'late')
    elif kind in ('pause', 'cut'):
        seconds = some_duration(run)
        run.bound = 5.0
        run.at(start, run.pause, seconds) if kind == 'pause' else run.at(
            start, run.cut, seconds, rng.choice(('both', 'up', 'down'))
        )
        run.faults_end = start + seconds
    elif kind == 'outage':
        seconds = rng.choice((0.1, 1.0, 5.0)) * TIMEOUT
        run.bound = run.settings.interval + 1.0 + slack
        run.keeps = True
        run.at(start, run.restart_server, seconds)
        run.faults_end = start + seconds
    elif kind == 'lock':
        run.bound = 1.0 + run.settings.release_timeout
        run.at(start, run.pin_somewhere)
    elif kind in ('enroll', 'withdraw'):
        run.bound = run.settings.release_timeout + 0.5 + slack
        groups = frozenset({'new'} if kind == 'enroll' else ())
        run.at(start, run.enroll, rng.choice(run.names), groups)
    else:
        run.bound = run.settings.release_timeout + slack
        run.at(start, run.drain, 'node', True)
    run.step = 0.05


def restores(run: Run) -> None:
    """The database comes back from a backup of the same server, long after all leases have run
    out.
    """
    start = start_cluster(run)
    rng = run.world.rng
    standby: list[SimStore] = []
    moment = start + rng.random() * TIMEOUT
    run.at(moment, run.remember, standby)
    for time in some_times(run, moment, TIMEOUT, 3):
        run.at(time, rng.choice((run.leave, run.change_locks, run.change_locks)))
    for time in some_times(run, moment - 0.3, 0.05 * TIMEOUT, 3):
        run.at(time, run.pin_somewhere)
    for index in range(rng.choice((0, 1, 2))):
        run.at(max(0.0, moment - rng.random() * 2.5), run.spawn, f'm{index}')
    taken = (
        rng.choice((0.05, 0.2, 1.1)) * TIMEOUT
    )  # within it some nodes send no heartbeat that the backup lacks
    run.at(moment + taken, run.restore, standby, TIMEOUT * (1.1 + rng.random()))
    run.faults_end += 3 * TIMEOUT


def flapping(run: Run) -> None:
    """A lock wanders from node to node while hand-overs are carried out late and notifications get
    lost.
    """
    start = start_cluster(run, 3)
    rng, network = run.world.rng, run.world.network
    network.late_gives, network.lateness, network.lost_notification = 0.6, 2 * TIMEOUT, 0.7
    time = start
    for _ in range(14):
        run.at(time, run.pin, 0, rng.choice(run.names))
        time += rng.uniform(0.3, 2.5)
    run.at(time, run.expire_locks)


def headless(run: Run) -> None:
    """The receiver of tokens leaves while their owner is paused, and there is no leader to plan
    anew.
    """
    run.settings = Settings(**{**vars(run.settings), 'has_release': False})
    start = start_cluster(run, 4) + TIMEOUT
    rng = run.world.rng
    token, receiver = rng.randrange(run.world.store.total_tokens), rng.choice(run.names)
    run.at(start, run.pause_owner, token, rng.uniform(0.6, 2.0))
    run.at(start, run.pin, token, receiver)
    run.at(start + 0.3, run.pause_leader, TIMEOUT * 0.8)
    run.at(start + 0.4, run.leave, receiver)
    run.faults_end += TIMEOUT


def revivals(run: Run) -> None:
    """A node comes back just when it is found dead, and the leader's statement takes its time."""
    start = start_cluster(run, rng_count(run))
    rng, network = run.world.rng, run.world.network
    network.late_leads = 0.5
    for time in some_times(run, start, 2 * TIMEOUT, 3):
        run.at(
            time,
            rng.choice((run.pause, lambda seconds: run.cut(seconds, 'both'))),
            TIMEOUT * rng.uniform(0.95, 1.3),
        )
    run.faults_end += 3 * TIMEOUT


def rng_count(run: Run) -> int:
    """Three nodes or four."""
    return run.world.rng.choice((3, 4))


def meddling(run: Run) -> None:
    """Another session writes assignment rows that overlap; the database refuses them."""
    start = start_cluster(run)
    for time in some_times(run, start, 2 * TIMEOUT, 5):
        run.at(time, run.meddle)
    run.faults_end += TIMEOUT


def everything(run: Run) -> None:
    """All of it at once, but failovers."""
    start = start_cluster(run)
    rng, network = run.world.rng, run.world.network
    network.slow, network.lost_reply, network.late = (
        rng.random() * 0.05,
        rng.random() * 0.03,
        rng.random() * 0.03,
    )
    network.lost_notification = rng.choice((0.0, 0.1, 0.5))
    choices: list[Callable[[], object]] = [
        lambda: run.pause(some_duration(run)),
        lambda: run.cut(some_duration(run), rng.choice(('both', 'up', 'down'))),
        lambda: run.crash(None, rng.choice((None, 0.05, 2.0))),
        lambda: run.leave(None, rng.choice((None, 0.05, 2.0))),
        lambda: run.restart_server(some_duration(run)),
        lambda: run.freeze_server(some_duration(run)),
        run.change_locks,
        run.deafen,
        lambda: run.drain(rng.choice(('node', 'itself', 'operator')), rng.random() < 0.5),
        run.jump_clock,
        lambda: run.spawn(rng.choice(run.names)),
        lambda: run.spawn(f'm{rng.randrange(3)}'),
    ]
    for time in some_times(run, 0.5, start + 3 * TIMEOUT, 9, 2):
        run.at(time, rng.choice(choices))
    run.at(run.faults_end + 3 * TIMEOUT, run.undrain_all)
    run.at(run.faults_end, run.expire_locks)


def _copied(run: Run, until: float) -> float:
    """When a standby stopped following; now and then before the first node had joined, so that the
    cluster's row names no history.
    """
    rng = run.world.rng
    return rng.uniform(1.1, until) if rng.random() < 0.8 else rng.random() * 1.5


def promotions(run: Run) -> None:
    """A standby that lacks much is promoted. Some nodes cannot notice and hold their leases; others
    are new and have nothing to compare.
    """
    run.world.store.tells_history = True
    start = start_cluster(run)
    rng = run.world.rng
    standby: list[SimStore] = []
    moment = start + rng.random() * TIMEOUT
    run.at(_copied(run, moment), run.remember, standby)
    for name in rng.sample(run.names, rng.randint(1, len(run.names))):
        how = rng.choice((run.pause, lambda seconds, name: run.cut(seconds, 'both', name)))
        run.at(moment - rng.random() * 0.5, how, some_duration(run), name)
    if rng.random() < 0.5:
        run.at(moment, run.promote, standby)
    else:
        run.at(moment, run.fail_over, standby, rng.random())
    for index in range(rng.randint(1, 3)):
        run.at(moment + rng.random() * TIMEOUT, run.spawn, f'm{index}')
    if rng.random() < 0.5:
        # The same once more: a standby that has never heard of the first promotion, so that its
        # timeline has the same number.
        run.at(moment + 1.5 * TIMEOUT, run.promote, standby)
    run.faults_end += 3 * TIMEOUT


def reused(run: Run) -> None:
    """Standbys are promoted in turn, none of which follows the one before: the names of their
    histories are the same.
    """
    run.world.store.tells_history = True
    run.world.network.slow = run.world.rng.choice((0.0, 0.2))
    start = start_cluster(run)
    rng = run.world.rng
    moment = start + rng.random() * TIMEOUT
    standbys: list[list[SimStore]] = [[] for _ in range(rng.choice((2, 2, 3)))]
    for standby in standbys:
        run.at(_copied(run, moment), run.remember, standby)
    for time in some_times(run, start, TIMEOUT, 2, 0):
        run.at(time, rng.choice((run.leave, run.crash)), None, rng.choice((None, 0.5)))
    for standby in standbys:
        for name in rng.sample(run.names, rng.randint(0, len(run.names))):
            how = rng.choice(
                (
                    run.pause,
                    lambda seconds, name: run.cut(
                        seconds, rng.choice(('both', 'up', 'down')), name
                    ),
                )
            )
            run.at(moment - 0.5 + rng.random() * TIMEOUT, how, some_duration(run), name)
        if rng.random() < 0.6:
            run.at(moment, run.promote, standby)
        else:
            run.at(moment, run.fail_over, standby, rng.random())
        for index in range(rng.randint(0, 2)):
            run.at(moment + rng.random() * TIMEOUT, run.spawn, f'm{index}')
        moment += rng.choice((rng.uniform(0.1, 2.5), rng.uniform(0.95, 1.25))) * TIMEOUT
    run.faults_end += 3 * TIMEOUT


def failbacks(run: Run) -> None:
    """After a failover the old primary comes back, whose row names its own history; every node has
    heard of the other one.
    """
    run.world.store.tells_history = True
    start = start_cluster(run) + rng_count(run)
    rng = run.world.rng
    standby: list[SimStore] = []
    old: list[SimStore] = []
    run.at(start - rng.random(), run.remember, standby)
    run.at(start, run.remember, old)
    run.at(start, run.promote, standby)
    back = start + 2 * TIMEOUT + rng.random()
    for time in some_times(run, start + TIMEOUT + 0.5, TIMEOUT * 0.9, 3, 1):
        run.at(time, run.pin_somewhere)
    for name in rng.sample(run.names, rng.randint(1, len(run.names))):
        how = rng.choice((run.pause, lambda seconds, name: run.cut(seconds, 'both', name)))
        run.at(back - rng.random() * 0.5, how, some_duration(run), name)
    run.at(back, run.fail_back, old)
    run.at(back + 2 * TIMEOUT, run.expire_locks)
    run.faults_end += 3 * TIMEOUT


def together(run: Run) -> None:
    """The two or three oldest nodes die at once: found as soon as one alone."""
    rng = run.world.rng
    count = rng.choice((2, 3))
    start = start_cluster(run, count + rng.choice((1, 2, 3))) + 2 * TIMEOUT + rng.random()
    run.at(start, run.crash_oldest, count)
    run.bound = TIMEOUT * 1.01 + run.settings.poll + 0.25
    run.step = 0.05


def refusals(run: Run) -> None:
    """Heartbeats work, and what the leader does beside them fails: for everybody for a while, or
    for one node for ever.
    """
    rng = run.world.rng
    start = start_cluster(run, rng.choice((3, 4, 5))) + TIMEOUT
    if rng.random() < 0.5:
        run.at(start, run.refuse, (Lead,))
        run.at(start + 0.1, rng.choice((run.crash, lambda: run.crash_oldest(1))))
        run.at(start + 0.1 + TIMEOUT * 1.01 + run.settings.poll + 0.75, run.check_evicted)
        run.at(start + rng.uniform(1.5, 5) * TIMEOUT, run.refuse, ())
    else:
        run.at(
            start, run.refuse_oldest, rng.choice(((Lead,), (Lead, Evict), (Lead, Evict, Observe)))
        )
        run.at(
            start + 0.1,
            rng.choice(
                (
                    run.pin_somewhere,
                    lambda: run.spawn('late'),
                    lambda: run.crash(run.by_age()[-1]),
                    lambda: run.leave(run.by_age()[1]),
                )
            ),
        )
    run.bound = 3.5 * TIMEOUT + run.settings.wait_on_enter + run.settings.check_interval


FAMILIES: dict[str, Callable[[Run], None]] = {
    f.__name__: f
    for f in (
        everything,
        pauses,
        partitions,
        crashes,
        rolling,
        outages,
        lossy,
        locks,
        drains,
        names,
        failovers,
        single,
        restores,
        flapping,
        headless,
        revivals,
        meddling,
        promotions,
        together,
        refusals,
        reused,
        failbacks,
        enrolling,
        belated,
        deserted,
        forgotten,
        renamed,
        erased,
        upgrades,
    )
}


def prepare(seed: int, family: str | None = None, *, tracing: int = 0) -> Run:
    """Build the schedule of a seed."""
    family = family or sorted(FAMILIES)[seed % len(FAMILIES)]
    world = World(
        seed,
        (12, 16, 24, 7)[seed // len(FAMILIES) % 4],
        tracing=tracing,
        real_ownership=seed % 50 == 49,
    )
    rng = world.rng
    world.store.tells_history = rng.random() < 0.7
    interval = rng.choice((1.0, 1.5, 2.0))
    settings = Settings(
        interval=interval,
        timeout=TIMEOUT,
        lease=LEASE_FRACTION * TIMEOUT,
        check_interval=rng.choice((4.0, 10.0)),
        release_timeout=1.5,
        wait_on_enter=rng.choice((0.0, 0.0, 1.0, 2.0)),
        total_tokens=world.store.total_tokens,
        has_release=rng.random() < 0.4,
    )
    run = Run(seed, family, world, settings)
    world.spawn = run.respawn
    world.store.piece = rng.choice((None, None, 4, 8))
    if rng.random() < 0.4:
        have_groups(run)
    FAMILIES[family](run)
    if run.groups and not run.bound:
        for time in some_times(run, 1.0, run.faults_end - 1.0, 4, 0):
            run.at(time, run.enroll)
    world.at(1.0, run.use, run.faults_end + TIMEOUT)
    run.bound = run.bound or 4.5 * TIMEOUT + settings.check_interval + 2 * settings.release_timeout
    return run


def play(run: Run) -> None:
    """Let the schedule happen and check that it ends well."""
    world = run.world
    world.run(run.faults_end)
    _calm(run)
    end = run.faults_end + run.bound
    reason: str | None = 'not looked yet'
    while world.now < end:
        world.run(world.now + run.step)
        reason = world.whole()
        if reason is None:
            break
    if reason is not None:
        raise Violation(f'I3: {run.bound:.1f} s after the last fault: {reason}')
    run.healed_after = world.now - run.faults_end
    _stay_quiet(run)


def _calm(run: Run) -> None:
    """All faults cease."""
    world = run.world
    world.network.late_gives = world.network.late_leads = world.network.late_enrolls = 0.0
    world.network.slow = world.network.lost_reply = world.network.late = (
        world.network.lost_notification
    ) = 0.0
    if not world.up:
        world.start_server()
    world.thaw_server()
    for node in list(world.nodes):
        if node.cut_up or node.cut_down:
            run.mend(node)
        node.resume()
    if not any(node.wanted for node in world.nodes):
        run.spawn('last')
    # A second process of one name stays without tokens for as long as the first one lives.
    world.run(world.now + 0.01)


def _stay_quiet(run: Run) -> None:
    """I4: nothing is written while nothing happens, and nobody loses what it has."""
    world = run.world
    version = world.store.version
    began, sent = world.now, {node: node.sent.copy() for node in world.nodes}
    leading = set(run.by_age()[:2])
    for _ in range(6):
        world.run(world.now + TIMEOUT / 4)
        reason = world.whole()
        if reason is not None:
            raise Violation(f'I3: whole, and then no more: {reason}')
    # A leader's round that was lost in the time of the faults may fail only now, so that it steps
    # down: it was no follower then.
    followers = set(run.by_age()[2:]) - leading
    for node in world.nodes:
        if node.name in followers and node in sent and node.protocol.phase is Phase.ACTIVE:
            _check_cost(node, node.sent - sent[node], world.now - began)
    evictions = sum(node.protocol.evictions for node in world.nodes)
    if run.keeps and evictions:
        raise Violation(f'I4: {evictions} evictions although no node failed')
    if world.store.version != version:
        raise Violation(
            f'I4: {world.store.version - version} plans were written while nothing happened'
        )
    for node in world.nodes:
        if node.announced != len(node.ownership.tokens):
            raise Violation(
                f'events: {node} was told of {node.announced} tokens and has '
                f'{len(node.ownership.tokens)}'
            )


def _check_cost(node: SimNode, sent: Counter[str], seconds: float) -> None:
    """I7: a steady follower sends its heartbeats alone, and few more of them than it must to fall
    in behind the older ones.
    """
    beats = sent.pop('Beat', 0)
    for name in (
        'Take',
        'Lives',
    ):  # an open promise of another node is looked at again until it is kept or lapses
        sent.pop(name, None)
    if sum(sent.values()) > 2 or beats > 1.02 * seconds / node.settings.interval + 3:
        raise Violation(
            f'I7: {node} sent {beats} heartbeats and {dict(sent)} in {seconds:.1f} s in which '
            'nothing happened'
        )


def run(seed: int, family: str | None = None, *, tracing: int = 0) -> Run:
    """Play one schedule.

    Raises:
        Violation: An invariant does not hold; the seed and the last events are in the message.
    """
    prepared = prepare(seed, family, tracing=tracing)
    try:
        play(prepared)
    except Exception as error:
        if tracing:
            trace = '\n'.join(prepared.world.history)
            raise Violation(f'seed {seed}, family {prepared.family}: {error}\n{trace}') from error
        raise Violation(f'seed {seed}, family {prepared.family}: {error}') from error
    return prepared
