"""One schedule of faults under way, and the faults themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from jobsync_core.assignment.model import Segment
from jobsync_core.protocol.node import Settings

from .invariants import Violation
from .node import TASKS_PER_TOKEN, SimNode
from .store import Lock, Overlap, SimStore
from .world import World

__all__ = ['TIMEOUT', 'Run']

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
    #: The queue groups that nodes may belong to, and those of each name at its start.
    groups: tuple[str, ...] = ()
    groups_of: dict[str, frozenset[str]] = field(default_factory=dict)
    #: Names of nodes that know of no groups.
    old: frozenset[str] = frozenset()

    def spawn(
        self,
        name: str,
        *,
        machine: int | None = None,
        delay: float = 0.0,
        weight: float | None = None,
    ) -> None:
        """Start a process of that name after `delay` seconds."""
        self.world.at(self.world.now + delay, self._spawn, name, machine, weight)

    def _spawn(self, name: str, machine: int | None, weight: float | None) -> None:
        rng = self.world.rng
        settings = self.settings
        if weight is not None:
            settings = Settings(**{**vars(settings), 'weight': weight})
        is_old = name in self.old
        groups = self.groups_of.setdefault(name, self.some_groups())
        if groups and not is_old:
            settings = Settings(**{**vars(settings), 'groups': tuple(sorted(groups))})
        slow = rng.random() < 0.15
        self.world.add(
            SimNode(
                self.world,
                name,
                settings,
                rate=rng.choice((0.99, 1.01, 1 + rng.uniform(-0.01, 0.01))),
                offset=rng.uniform(10, 1e5),
                machine=rng.randrange(3) if machine is None else machine,
                release_times=lambda: (
                    rng.random() * settings.release_timeout * (2.5 if slow else 0.5)
                ),
                is_old=is_old,
            )
        )

    def respawn(self, node: SimNode) -> None:
        """What a supervisor does with a process that ended by itself."""
        if not any(other.name == node.name for other in self.world.nodes):
            self._spawn(node.name, node.machine, node.settings.weight)

    def some_groups(self) -> frozenset[str]:
        """None of the groups, one, or several."""
        return frozenset(group for group in self.groups if self.world.rng.random() < 0.5)

    def enroll(self, name: str | None = None, groups: frozenset[str] | None = None) -> None:
        """Somebody has a worker consume other queues."""
        node = self.any_node() if name is None else self.node(name)
        if node is not None:
            wanted = self.some_groups() if groups is None else groups
            self.groups_of[node.name] = wanted  # as its supervisor starts it from now on
            node.enroll(wanted)

    def reconsider(self) -> None:
        """Somebody has a worker consume a queue more, and takes that back at once."""
        node = self.any_node()
        if node is not None:
            wanted = node.wants
            node.enroll(wanted | {self.world.rng.choice(self.groups)})
            node.enroll(wanted)

    def desert(self, group: str) -> None:
        """Everybody leaves a group."""
        for node in list(self.world.nodes):
            if group in node.wants:
                self.enroll(node.name, node.wants - {group})

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
        if node is None or len([other for other in self.world.nodes if other.wanted]) <= 1:
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
        self.world.at(self.world.now + seconds, self.mend, node)

    def mend(self, node: SimNode) -> None:
        """The link is whole again."""
        node.cut_up = node.cut_down = False
        self.world.trace(node, 'mended', '')
        world = self.world
        if (
            node.running
            and node.connection is not None
            and not world.has_connection(node.connection)
        ):
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
        if how != 'operator':
            node.drain(draining, by_itself=how == 'itself')
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
            group = rng.choice(self.groups) if self.groups and rng.random() < 0.3 else None
            expires = store.clock + rng.uniform(0.2, 3 * TIMEOUT) if rng.random() < 0.4 else None
            store.add_lock(
                f'{token}.{rng.randrange(TASKS_PER_TOKEN)}',
                Lock(token, patterns, store.clock, expires, group),
            )
        world.deliver_notifications()

    def pin_somewhere(self) -> None:
        """Pin one token to one live node."""
        node = self.any_node()
        if node is not None:
            self.pin(self.world.rng.randrange(self.world.store.total_tokens), node.name)

    def pin(self, token: int, name: str) -> None:
        """Pin one token to one node, in place of another lock."""
        store = self.world.store
        store.clock = self.world.now + self.world.database_offset
        store.add_lock(f'{token}.0', Lock(token, (name,), store.clock))
        self.world.deliver_notifications()

    def pause_owner(self, token: int, seconds: float) -> None:
        """Pause the node that has the token."""
        owner = self.world.store.per_token()[token].node
        if owner is not None:
            self.pause(seconds, owner)

    def replace(self, name: str) -> None:
        """End a process of an old version, if it is still there."""
        self.old -= {name}
        node = self.node(name)
        if node is not None and node.is_old:
            node.crash()

    def pause_leader(self, seconds: float) -> None:
        """Pause the oldest node."""
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

    def erase(self, lo: int | None = None) -> None:
        """Somebody deletes a row of the assignment."""
        store = self.world.store
        self.world.owner_checked = self.world.tasks_checked = False
        if store.segments:
            store.erase(self.world.rng.choice(store.segments).lo if lo is None else lo)

    def cut_on_refresh(self, name: str, until: float) -> None:
        """Cut a node off for long, just when it asks for its rows."""
        node = self.node(name)
        if node is not None and node.asks_for_rows:
            self.cut(TIMEOUT * 1.3, 'both', name)
        elif self.world.now < until:
            self.world.at(self.world.now + 0.001, self.cut_on_refresh, name, until)

    def erase_of(self, name: str) -> None:
        """Somebody deletes a row of a node that is cut off as soon as it looks for it."""
        rows = [row for row in self.world.store.segments if row.node == name]
        if rows:
            self.erase(self.world.rng.choice(rows).lo)
            self.cut_on_refresh(name, self.world.now + 2 * self.settings.interval)

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

    def promote(self, standby: list[SimStore]) -> None:
        """A failover behind a pooler: nobody loses a connection. The standby itself stays as it
        was: there may be two that are alike.
        """
        self.world.owner_checked = self.world.tasks_checked = False
        self.world.promote(standby[0])

    def fail_back(self, old: list[SimStore]) -> None:
        """Somebody puts the primary of before back in its place, behind a pooler."""
        self.world.owner_checked = self.world.tasks_checked = False
        self.world.fail_back(old[0])

    def refuse(self, kinds: tuple[type, ...], name: str | None = None) -> None:
        """The server cannot do this for one node, or for any, until further notice."""
        self.world.refused[name] = kinds

    def refuse_oldest(self, kinds: tuple[type, ...]) -> None:
        """The same for the node that leads."""
        self.refuse(kinds, self.by_age()[0])

    def by_age(self) -> list[str]:
        """The names in the node table, the oldest first."""
        rows = sorted(self.world.store.nodes.values(), key=lambda row: (row.created_on, row.name))
        return [row.name for row in rows]

    def crash_oldest(self, count: int) -> None:
        """The oldest nodes die at once."""
        for name in self.by_age()[:count]:
            self.crash(name)

    def check_entered(self, name: str) -> None:
        """By now this process must have entered."""
        node = self.node(name)
        if node is not None and not node.paused and not node.entered:
            raise Violation(f'entering: {node} has not entered: {node.protocol.phase.value}')

    def check_evicted(self) -> None:
        """By now every process that died must be out of the node table."""
        lives = {node.protocol.incarnation for node in self.world.nodes}
        for row in self.world.store.nodes.values():
            if row.incarnation not in lives:
                raise Violation(f'eviction: {row.sign} is dead and still in the table')

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
