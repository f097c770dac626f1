"""Families of schedules: which faults happen when, drawn from a seed.

Each family is a function that builds a World and plans its faults; `run(seed)` plays one schedule to its end: faults,
then calm until the cluster is whole (I3), then a quiet time in which nothing may be written (I4).
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from jobsync_core.messages import Segment
from jobsync_core.protocol import Settings

from .invariants import Violation
from .store import Lock, Overlap, SimStore
from .world import LEASE_FRACTION, TASKS_PER_TOKEN, SimNode, World

__all__ = ['FAMILIES', 'Run', 'play', 'run']

TIMEOUT = 6.0


@dataclass
class Run:
    """One schedule."""

    seed: int
    family: str
    world: World
    settings: Settings
    faults_end: float = 0.0
    #: Seconds after the last fault within which the cluster must be whole.
    bound: float = 0.0
    names: list[str] = field(default_factory=list)
    #: How long it took to become whole after the faults; for reports.
    healed_after: float = 0.0
    #: How often it is looked whether the cluster is whole.
    step: float = 0.25
    #: No node may be evicted and no token may move.
    keeps: bool = False

    # --- building ---

    def spawn(self, name: str, *, machine: int | None = None, delay: float = 0.0, weight: float | None = None) -> None:
        """Start a process of that name after `delay` seconds."""
        self.world.at(self.world.now + delay, self._spawn, name, machine, weight)

    def _spawn(self, name: str, machine: int | None, weight: float | None) -> None:
        rng = self.world.rng
        settings = self.settings
        if weight is not None:
            settings = Settings(**{**vars(settings), 'weight': weight})
        slow = rng.random() < 0.15
        self.world.add(SimNode(
            self.world, name, settings, rate=rng.choice((0.99, 1.01, 1 + rng.uniform(-0.01, 0.01))), offset=rng.uniform(10, 1e5),
            machine=rng.randrange(3) if machine is None else machine,
            release_times=lambda: rng.random() * settings.release_timeout * (2.5 if slow else 0.5)))

    def respawn(self, node: SimNode) -> None:
        """What a supervisor does with a process that ended by itself."""
        if not any(other.name == node.name for other in self.world.nodes):
            self._spawn(node.name, node.machine, node.settings.weight)

    def at(self, time: float, action: Callable[..., object], *args: object) -> None:
        """Plan a fault."""
        self.faults_end = max(self.faults_end, time)
        self.world.at(time, action, *args)

    def node(self, name: str) -> SimNode | None:
        """The first live process of that name."""
        return next((node for node in self.world.nodes if node.name == name), None)

    def any_node(self) -> SimNode | None:
        """A live process."""
        nodes = self.world.nodes
        return self.world.rng.choice(nodes) if nodes else None

    # --- faults, each on a random node unless one is named ---

    def crash(self, name: str | None = None, restart_in: float | None = None) -> None:
        node = self.any_node() if name is None else self.node(name)
        if node is None:
            return
        node.crash()
        if restart_in is not None:
            machine = node.machine if self.world.rng.random() < 0.5 else node.machine + 100
            self.spawn(node.name, machine=machine, delay=restart_in)

    def leave(self, name: str | None = None, restart_in: float | None = None) -> None:
        node = self.any_node() if name is None else self.node(name)
        if node is None or sum(n.wanted for n in self.world.nodes) <= 1:
            return
        node.leave()
        if restart_in is not None:
            self.spawn(node.name, machine=node.machine, delay=restart_in)

    def pause(self, seconds: float, name: str | None = None) -> None:
        node = self.any_node() if name is None else self.node(name)
        if node is not None:
            node.pause()
            self.world.at(self.world.now + seconds, node.resume)

    def cut(self, seconds: float, how: str, name: str | None = None) -> None:
        node = self.any_node() if name is None else self.node(name)
        if node is None:
            return
        node.cut_up, node.cut_down = how in ('both', 'up'), how in ('both', 'down')
        self.world.trace(node, 'cut', how)
        self.world.at(self.world.now + seconds, self._mend, node)

    def _mend(self, node: SimNode) -> None:
        node.cut_up = node.cut_down = False
        self.world.trace(node, 'mended', '')
        world = self.world
        if node.running and node.connection is not None and not world.has_connection(node.connection):
            world.at(world.now + 0.01, node.disconnect)

    def deafen(self) -> None:
        node = self.any_node()
        if node is not None:
            node.deaf = True

    def restart_server(self, seconds: float) -> None:
        self.world.stop_server()
        self.world.at(self.world.now + seconds, self.world.start_server)

    def freeze_server(self, seconds: float) -> None:
        self.world.freeze_server()
        self.world.at(self.world.now + seconds, self.world.thaw_server)

    def jump_clock(self) -> None:
        """Somebody sets the database's clock."""
        self.world.database_offset += self.world.rng.uniform(-100, 100)

    def drain(self, how: str, draining: bool) -> None:
        node = self.any_node()
        if node is None:
            return
        if how == 'node':
            node.drain(draining)
        elif self.world.up:
            self.world.store.set_draining(node.name, draining)
            self.world.deliver_notifications()

    def undrain_all(self) -> None:
        for node in list(self.world.nodes):
            node.drain(False)
            if self.world.up and self.world.store.nodes.get(node.name) is not None:
                self.world.store.set_draining(node.name, False)
        self.world.deliver_notifications()

    def change_locks(self) -> None:
        world, rng = self.world, self.world.rng
        store = world.store
        if not world.up or world.frozen:
            return
        store.clock = world.now + world.database_offset
        if store.locks and rng.random() < 0.4:
            store.clear_lock(rng.choice(sorted(store.locks)))
        else:
            token = rng.randrange(store.total_tokens)
            names = [*self.names, '%', 'nobody', 'n%']
            patterns = tuple(rng.sample(names, rng.choice((1, 1, 2))))
            expires = store.clock + rng.uniform(0.2, 3 * TIMEOUT) if rng.random() < 0.4 else None
            store.add_lock(f'{token}.{rng.randrange(TASKS_PER_TOKEN)}', Lock(token, patterns, store.clock, expires))
        world.deliver_notifications()

    def pin_somewhere(self) -> None:
        """Pin one token to one live node."""
        node = self.any_node()
        assert node is not None
        self.pin(self.world.rng.randrange(self.world.store.total_tokens), node.name)

    def pin(self, token: int, name: str) -> None:
        """Pin one token to one node, in place of another lock."""
        store = self.world.store
        store.clock = self.world.now + self.world.database_offset
        store.add_lock(f'{token}.0', Lock(token, (name,), store.clock))
        self.world.deliver_notifications()

    def pause_leader(self, seconds: float) -> None:
        rows = self.world.store.nodes.values()
        if rows:
            self.pause(seconds, min(rows, key=lambda row: (row.created_on, row.name)).name)

    def meddle(self) -> None:
        """Try to insert a row for tokens that have an owner."""
        store, node = self.world.store, self.any_node()
        if node is None:
            return
        lo = self.world.rng.randrange(store.total_tokens)
        try:
            store.insert(Segment(lo, lo + 1, node.name, version=store.version))
        except Overlap:
            self.world.trace(node, 'refused', lo)
        store.version += 1  # everybody looks

    def restore(self, standby: list[SimStore], seconds: float) -> None:
        """Restore a backup; `seconds` pass before the server is there again."""
        self.world.tasks_checked = False
        self.world.stop_server()
        self.world.at(self.world.now + seconds, self.world.restore, standby[0])

    def expire_locks(self) -> None:
        """Let no lock expire in the quiet time."""
        world = self.world
        for task, lock in list(world.store.locks.items()):
            if lock.expires_at is not None:
                world.store.clear_lock(task)
        world.deliver_notifications()

    def fail_over(self, standby: list[SimStore], seconds: float) -> None:
        self.world.owner_checked = self.world.tasks_checked = False
        self.world.fail_over(standby[0])
        self.world.at(self.world.now + seconds, self.world.start_server)

    def remember(self, standby: list[SimStore]) -> None:
        standby[:] = [self.world.store.snapshot()]

    def use(self, until: float) -> None:
        """The user's code asks, now and then, on some node."""
        node = self.any_node()
        if node is not None:
            node.use()
        if self.world.rng.random() < 0.1:
            node = self.any_node()
            if node is not None:
                node.write_audit()
        if self.world.now < until:
            self.world.at(self.world.now + self.world.rng.random() * TIMEOUT / 8, self.use, until)


def _cluster(run: Run, count: int | None = None, *, spread: float = 1.0) -> float:
    """Start a cluster; returns when it should be formed."""
    rng = run.world.rng
    count = count or rng.choice((2, 3, 3, 4, 4, 5, 6))
    weighted = rng.random() < 0.2
    for index in range(count):
        name = f'n{index}'
        run.names.append(name)
        run.spawn(name, delay=rng.random() * spread, weight=rng.choice((0.5, 1.0, 2.0, 3.0)) if weighted else None)
    return spread + run.settings.wait_on_enter + 2.0


def _times(run: Run, start: float, length: float, most: int, least: int = 1) -> list[float]:
    rng = run.world.rng
    return sorted(start + rng.random() * length for _ in range(rng.randint(least, most)))


def _duration(run: Run) -> float:
    """Lengths around the times that matter: a hiccup, near the lease, near the timeout, long."""
    rng = run.world.rng
    return rng.choice((rng.random() * 0.2 * TIMEOUT, rng.uniform(0.8, 1.2) * LEASE_FRACTION * TIMEOUT, rng.uniform(0.9, 1.3) * TIMEOUT, rng.uniform(1, 3) * TIMEOUT))


def pauses(run: Run) -> None:
    """Processes stop and go on."""
    start = _cluster(run)
    for time in _times(run, start, 3 * TIMEOUT, 4):
        run.at(time, run.pause, _duration(run))
    run.faults_end += 3 * TIMEOUT


def partitions(run: Run) -> None:
    """Links fail, both ways or one way, and come back."""
    start = _cluster(run)
    for time in _times(run, start, 3 * TIMEOUT, 4):
        run.at(time, run.cut, _duration(run), run.world.rng.choice(('both', 'up', 'down')))
    run.faults_end += 3 * TIMEOUT


def crashes(run: Run) -> None:
    """Processes die; most come back under their name, on the same machine or another."""
    start = _cluster(run)
    rng = run.world.rng
    for time in _times(run, start, 3 * TIMEOUT, 4):
        run.at(time, run.crash, None, rng.choice((None, 0.05, rng.random() * 2 * TIMEOUT)))
    run.faults_end += 2 * TIMEOUT


def rolling(run: Run) -> None:
    """Joins, leaves and restarts, one after another."""
    start = _cluster(run)
    rng = run.world.rng
    for time in _times(run, start, 2.66667 * TIMEOUT, 5):
        run.at(time, run.leave, None, rng.choice((None, 0.05, rng.random() * 2)))
    for index, time in enumerate(_times(run, start, 2.66667 * TIMEOUT, 2, 0)):
        run.names.append(f'm{index}')
        run.at(time, run.spawn, f'm{index}')
    run.faults_end += 2


def outages(run: Run) -> None:
    """The database restarts or hangs, for any length; no node is to blame for it."""
    run.keeps = True
    start = _cluster(run)
    rng = run.world.rng
    for time in _times(run, start, 3 * TIMEOUT, 2):
        run.at(time, rng.choice((run.restart_server, run.restart_server, run.freeze_server)), _duration(run))
    run.faults_end += 3 * TIMEOUT


def lossy(run: Run) -> None:
    """Slow and lost replies, statements carried out late, notifications that never come."""
    start = _cluster(run)
    rng, network = run.world.rng, run.world.network
    network.slow, network.lost_reply, network.late = rng.random() * 0.1, rng.random() * 0.05, rng.random() * 0.05
    network.lost_notification = rng.choice((0.0, 0.3, 1.0))
    for time in _times(run, start, 3 * TIMEOUT, 3):
        run.at(time, rng.choice((run.deafen, run.leave, run.crash)))
    run.faults_end += 2


def locks(run: Run) -> None:
    """Locks come, expire and go while nodes come and go."""
    start = _cluster(run)
    rng = run.world.rng
    for time in _times(run, start * 0.3, 3 * TIMEOUT, 12, 3):
        run.at(time, run.change_locks)
    for time in _times(run, start, 2.66667 * TIMEOUT, 2, 0):
        run.at(time, rng.choice((run.leave, run.crash)), None, 1.0)
    run.at(start + 4 * TIMEOUT, run.expire_locks)


def drains(run: Run) -> None:
    """Nodes are drained by themselves and by an operator."""
    start = _cluster(run)
    rng = run.world.rng
    for time in _times(run, start, 2.66667 * TIMEOUT, 6):
        run.at(time, run.drain, rng.choice(('node', 'operator')), rng.random() < 0.7)
    for time in _times(run, start, 2.66667 * TIMEOUT, 2, 0):
        run.at(time, rng.choice((run.leave, run.crash)), None, 1.0)
    run.at(start + 3 * TIMEOUT, run.undrain_all)


def names(run: Run) -> None:
    """Two processes of one name, one of them paused, cut off or alive."""
    start = _cluster(run)
    rng = run.world.rng
    for time in _times(run, start, 2 * TIMEOUT, 2):
        name = rng.choice(run.names)
        run.at(time, rng.choice((run.pause, lambda seconds, name: run.cut(seconds, 'both', name))), _duration(run), name)
        run.at(time + rng.random(), run.spawn, name)
    run.faults_end += 3 * TIMEOUT


def failovers(run: Run) -> None:
    """A standby that lacks the last writes is promoted, old leases still running."""
    start = _cluster(run)
    rng = run.world.rng
    standby: list[SimStore] = []
    for time in _times(run, start, 1.33333 * TIMEOUT, 3, 0):
        run.at(time, rng.choice((run.leave, run.crash)), None, None)
    moment = start + rng.random() * 2 * TIMEOUT
    run.at(moment, run.remember, standby)
    run.at(moment + rng.random() * 1.5, run.fail_over, standby, rng.random() * 2)
    for time in _times(run, moment, TIMEOUT, 2, 0):
        run.at(time, run.pause, _duration(run))
    run.faults_end += 3 * TIMEOUT


def single(run: Run) -> None:
    """One fault in a whole cluster, and the time that it may cost."""
    rng = run.world.rng
    start = _cluster(run, rng.choice((3, 4, 5))) + run.settings.timeout
    slack = run.settings.poll + 0.25
    kind = rng.choice(('kill', 'leave', 'join', 'pause', 'cut', 'outage', 'lock', 'drain'))
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
        seconds = _duration(run)
        run.bound = 5.0
        run.at(start, run.pause, seconds) if kind == 'pause' else run.at(start, run.cut, seconds, rng.choice(('both', 'up', 'down')))
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
    else:
        run.bound = run.settings.release_timeout + slack
        run.at(start, run.drain, 'node', True)
    run.step = 0.05


def restores(run: Run) -> None:
    """The database comes back from a backup of the same server, long after all leases have run out."""
    start = _cluster(run)
    rng = run.world.rng
    standby: list[SimStore] = []
    moment = start + rng.random() * TIMEOUT
    run.at(moment, run.remember, standby)
    for time in _times(run, moment, TIMEOUT, 3):
        run.at(time, rng.choice((run.leave, run.change_locks, run.change_locks)))
    run.at(moment + TIMEOUT * 1.1, run.restore, standby, TIMEOUT * (1.1 + rng.random()))
    run.faults_end += 3 * TIMEOUT


def flapping(run: Run) -> None:
    """A lock wanders from node to node while hand-overs are carried out late and notifications get lost."""
    start = _cluster(run, 3)
    rng, network = run.world.rng, run.world.network
    network.late_gives, network.lateness, network.lost_notification = 0.6, 2 * TIMEOUT, 0.7
    time = start
    for _ in range(14):
        run.at(time, run.pin, 0, rng.choice(run.names))
        time += rng.uniform(0.3, 2.5)
    run.at(time, run.expire_locks)


def headless(run: Run) -> None:
    """The receiver of tokens leaves during the hand-over, and there is no leader to plan anew."""
    run.settings = Settings(**{**vars(run.settings), 'has_release': True})
    start = _cluster(run, 4) + TIMEOUT
    rng = run.world.rng
    names = rng.sample(run.names, 4)
    run.at(start, run.pin, rng.randrange(run.world.store.total_tokens), names[0])
    run.at(start + 0.3, run.pause_leader, TIMEOUT * 0.8)
    run.at(start + 0.3 + rng.random() * 0.5, run.leave, names[0])
    run.faults_end += TIMEOUT


def revivals(run: Run) -> None:
    """A node comes back just when it is found dead, and the leader's statement takes its time."""
    start = _cluster(run, rng_count(run))
    rng, network = run.world.rng, run.world.network
    network.late_leads = 0.5
    for time in _times(run, start, 2 * TIMEOUT, 3):
        run.at(time, rng.choice((run.pause, lambda seconds: run.cut(seconds, 'both'))), TIMEOUT * rng.uniform(0.95, 1.3))
    run.faults_end += 3 * TIMEOUT


def rng_count(run: Run) -> int:
    """Three nodes or four."""
    return run.world.rng.choice((3, 4))


def meddling(run: Run) -> None:
    """Another session writes assignment rows that overlap; the database refuses them."""
    start = _cluster(run)
    for time in _times(run, start, 2 * TIMEOUT, 5):
        run.at(time, run.meddle)
    run.faults_end += TIMEOUT


def everything(run: Run) -> None:
    """All of it at once, but failovers."""
    start = _cluster(run)
    rng, network = run.world.rng, run.world.network
    network.slow, network.lost_reply, network.late = rng.random() * 0.05, rng.random() * 0.03, rng.random() * 0.03
    network.lost_notification = rng.choice((0.0, 0.1, 0.5))
    choices: list[Callable[[], object]] = [
        lambda: run.pause(_duration(run)), lambda: run.cut(_duration(run), rng.choice(('both', 'up', 'down'))),
        lambda: run.crash(None, rng.choice((None, 0.05, 2.0))), lambda: run.leave(None, rng.choice((None, 0.05, 2.0))),
        lambda: run.restart_server(_duration(run)), lambda: run.freeze_server(_duration(run)), run.change_locks, run.deafen,
        lambda: run.drain(rng.choice(('node', 'operator')), rng.random() < 0.5), run.jump_clock,
        lambda: run.spawn(rng.choice(run.names)), lambda: run.spawn(f'm{rng.randrange(3)}')]
    for time in _times(run, 0.5, start + 3 * TIMEOUT, 9, 2):
        run.at(time, rng.choice(choices))
    run.at(run.faults_end + 3 * TIMEOUT, run.undrain_all)
    run.at(run.faults_end, run.expire_locks)


FAMILIES: dict[str, Callable[[Run], None]] = {
    f.__name__: f for f in (
        everything, pauses, partitions, crashes, rolling, outages, lossy, locks, drains, names, failovers, single, restores, flapping, headless, revivals,
        meddling)}


def prepare(seed: int, family: str | None = None, *, tracing: int = 0) -> Run:
    """Build the schedule of a seed."""
    family = family or sorted(FAMILIES)[seed % len(FAMILIES)]
    world = World(seed, (12, 16, 24, 7)[seed // len(FAMILIES) % 4], tracing=tracing, real_claims=seed % 50 == 49)
    rng = world.rng
    interval = rng.choice((1.0, 1.5, 2.0))
    settings = Settings(
        interval=interval, timeout=TIMEOUT, lease=LEASE_FRACTION * TIMEOUT, check_interval=rng.choice((4.0, 10.0)), release_timeout=1.5,
        wait_on_enter=rng.choice((0.0, 0.0, 1.0, 2.0)), total_tokens=world.store.total_tokens, has_release=rng.random() < 0.4)
    run = Run(seed, family, world, settings)
    world.spawn = run.respawn
    FAMILIES[family](run)
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
    world.network.late_gives = world.network.late_leads = 0.0
    world.network.slow = world.network.lost_reply = world.network.late = world.network.lost_notification = 0.0
    if not world.up:
        world.start_server()
    world.thaw_server()
    for node in list(world.nodes):
        if node.cut_up or node.cut_down:
            run._mend(node)
        node.resume()
    if not any(node.wanted for node in world.nodes):
        run.spawn('last')
    # A second process of one name stays without tokens for as long as the first one lives.
    world.run(world.now + 0.01)


def _stay_quiet(run: Run) -> None:
    """I4: nothing is written while nothing happens, and nobody loses what it has."""
    world = run.world
    version = world.store.version
    for _ in range(6):
        world.run(world.now + TIMEOUT / 4)
        reason = world.whole()
        if reason is not None:
            raise Violation(f'I3: whole, and then no more: {reason}')
    if run.keeps and sum(node.protocol.evictions for node in world.nodes):
        raise Violation(f'I4: {sum(node.protocol.evictions for node in world.nodes)} evictions although no node failed')
    if world.store.version != version:
        raise Violation(f'I4: {world.store.version - version} plans were written while nothing happened')
    for node in world.nodes:
        if node.announced != len(node.claims.tokens):
            raise Violation(f'events: {node} was told of {node.announced} tokens and has {len(node.claims.tokens)}')


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
