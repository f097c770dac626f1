"""Families of schedules of queue groups: which of them nodes belong to changes while faults
happen.
"""

from __future__ import annotations

from .beginnings import have_groups, some_duration, some_times, start_cluster
from .schedule import TIMEOUT, Run
from .store import SimStore

__all__ = ['belated', 'deserted', 'enrolling', 'erased', 'forgotten', 'renamed', 'upgrades']


def enrolling(run: Run) -> None:
    """Workers begin and cease to consume queues while they come and go, stop, and lose answers."""
    have_groups(run)
    start = start_cluster(run)
    rng, network = run.world.rng, run.world.network
    run.world.store.piece = rng.choice((None, 1, 4))
    network.slow = rng.choice((0.0, 0.1))
    network.lost_reply = network.late = rng.choice((0.0, 0.05))
    network.lost_notification = rng.choice((0.0, 0.3, 1.0))
    for time in some_times(run, start * 0.3, 3 * TIMEOUT, 8, 4):
        run.at(time, run.enroll)
        run.at(time + rng.random() * 0.05, run.enroll)  # perhaps while a plan is being written
    for time in some_times(run, start, 2.5 * TIMEOUT, 3, 0):
        run.at(
            time,
            rng.choice(
                (
                    run.leave,
                    lambda: run.crash(None, rng.choice((None, 0.05, 2.0))),
                    lambda: run.pause(some_duration(run)),
                    lambda: run.cut(some_duration(run), rng.choice(('both', 'up', 'down'))),
                    lambda: run.drain('node', rng.random() < 0.5),
                )
            ),
        )
    run.at(run.faults_end + TIMEOUT, run.undrain_all)
    run.faults_end += 2 * TIMEOUT


def belated(run: Run) -> None:
    """What a worker said of its queues is carried out late, perhaps after it has said otherwise,
    and before anybody has planned for that.
    """
    have_groups(run)
    start = start_cluster(run)
    rng, network = run.world.rng, run.world.network
    network.late_enrolls, network.lateness = 0.5, TIMEOUT / 2
    network.lost_notification = rng.choice((0.5, 1.0))
    for time in some_times(run, start, TIMEOUT, 3, 1):
        name = rng.choice(run.names)
        run.at(time, run.enroll, name)
        run.at(time + TIMEOUT * rng.uniform(0.2, 0.8), run.enroll, name)
    run.faults_end += TIMEOUT


def deserted(run: Run) -> None:
    """A group loses its last member, which may be stopped or cut off, and gets another."""
    have_groups(run)
    start = start_cluster(run) + TIMEOUT
    rng = run.world.rng
    group = rng.choice(run.groups)
    last, *others = rng.sample(run.names, len(run.names))
    for name in run.names:
        run.groups_of[name] = run.some_groups() - {group}
    run.groups_of[last] |= {group}
    time = start
    for number in range(rng.randint(1, 3)):
        how = rng.choice(('enroll', 'enroll', 'crash', 'leave', 'both'))
        stops = rng.choice((None, run.pause, lambda seconds, name: run.cut(seconds, 'both', name)))
        if how in ('enroll', 'both'):
            run.at(time, run.desert, group)
        if stops is not None:
            run.at(time + rng.uniform(-0.2, 0.2), stops, some_duration(run), last)
        if how == 'both':
            run.at(time + rng.random(), run.crash, last, 0.5)
        elif how == 'crash':
            run.at(time, run.crash, last, None if number else 0.5)
        elif how == 'leave':
            run.at(time, run.leave, last, 0.5)
        time += rng.choice((-0.1, 0.02, 0.1, 0.5, rng.random() * 2 * TIMEOUT))
        last = rng.choice(others)
        run.at(time, run.enroll, last, frozenset({group}))
        time += rng.random() * TIMEOUT
    run.faults_end += 2 * TIMEOUT


def renamed(run: Run) -> None:
    """Workers consume one queue after another, so that ids of groups become free and others get
    them; now and then one takes back at once what it has begun.
    """
    run.groups = ('a', 'b', 'c', 'd', 'e')
    run.groups_of = {f'n{number}': frozenset('ab'[number % 2]) for number in range(6)}
    start = start_cluster(run)
    rng, network = run.world.rng, run.world.network
    run.world.store.piece = rng.choice((None, 1, 4))
    network.slow = rng.choice((0.0, 0.1))
    network.late = network.late_leads = rng.choice((0.0, 0.05))
    network.lost_notification = rng.choice((0.0, 0.3, 1.0))
    for time in some_times(run, start, 3 * TIMEOUT, 8, 4):
        for name in run.names if rng.random() < 0.3 else [rng.choice(run.names)]:
            run.at(time + 2 * rng.random(), run.enroll, name, frozenset(rng.choice(run.groups)))
    for time in some_times(run, start, 3 * TIMEOUT, 2, 0):
        run.at(time, rng.choice((run.pause, lambda seconds: run.cut(seconds, 'both'))), TIMEOUT / 2)
    end = run.faults_end + TIMEOUT
    for _ in range(8):
        run.at(end + rng.random() * TIMEOUT, run.reconsider)
    run.faults_end += 2 * TIMEOUT


def forgotten(run: Run) -> None:
    """A standby or a backup takes over that lacks the latest changes of groups, and gives them
    other ids.
    """
    have_groups(run)
    start = start_cluster(run)
    rng = run.world.rng
    who = rng.choice(('promoted', 'failed over', 'restored'))
    if who == 'promoted':
        run.world.store.tells_history = True  # else nobody can know of it, behind a pooler
    for name in run.names:
        run.groups_of[name] = run.some_groups() if rng.random() < 0.3 else frozenset()
    standby: list[SimStore] = []
    moment = start + TIMEOUT / 2
    for time in some_times(run, start, TIMEOUT / 2, 3, 0):
        run.at(time, run.enroll)
    run.at(moment, run.remember, standby)
    for time in some_times(run, moment, TIMEOUT, 6, 2):
        run.at(time, run.enroll)
    for name in rng.sample(run.names, rng.randint(0, 2)):
        how = rng.choice((run.pause, lambda seconds, name: run.cut(seconds, 'both', name)))
        run.at(moment + rng.random() * TIMEOUT, how, some_duration(run), name)
    moment += TIMEOUT * (1 + rng.random() / 4)
    if who == 'promoted':
        run.at(moment, run.promote, standby)
    elif who == 'failed over':
        run.at(moment, run.fail_over, standby, rng.random())
    else:
        run.at(moment, run.restore, standby, TIMEOUT * (1.1 + rng.random()))
    for time in some_times(run, moment, TIMEOUT, 3, 0):
        run.at(time, run.enroll)
    run.faults_end += 3 * TIMEOUT


def erased(run: Run) -> None:
    """Somebody deletes rows of the assignment, whose owners go on until they have heard of it."""
    have_groups(run)
    start = start_cluster(run) + run.settings.wait_on_enter
    rng = run.world.rng
    if rng.random() < 0.5:
        run.world.network.lost_notification = 1.0
        run.at(start, run.erase_of, rng.choice(run.names))
        run.faults_end += 3 * TIMEOUT
        return
    for time in some_times(run, start, 2 * TIMEOUT, 3):
        run.at(time, run.erase)
        if rng.random() < 0.5:
            stops = rng.choice((run.pause, lambda seconds: run.cut(seconds, 'both')))
            run.at(time + rng.uniform(-1, 1), stops, some_duration(run))
    for time in some_times(run, start, 2 * TIMEOUT, 3, 0):
        run.at(time, rng.choice((run.enroll, run.leave, lambda: run.crash(None, 0.5))))
    run.faults_end += 3 * TIMEOUT


def upgrades(run: Run) -> None:
    """The oldest nodes know of no groups; new ones come beside them and in their place, and lead,
    but where somebody has locked the rows of those.
    """
    have_groups(run)
    rng = run.world.rng
    run.old = frozenset(f'n{number}' for number in range(rng.randint(1, 3)))
    start = start_cluster(run, len(run.old))
    run.world.store.old_rows_locked = rng.random() < 0.5
    calm = rng.random() < 0.5  # while the new ones enter
    for index in range(rng.randint(1, 3)):
        run.names.append(f'm{index}')
        time = start + rng.random() * TIMEOUT
        run.at(time, run.spawn, f'm{index}')
        if calm:
            run.at(time + run.settings.wait_on_enter + TIMEOUT, run.check_entered, f'm{index}')
    time = (run.faults_end if calm else start) + rng.random() * TIMEOUT
    if rng.random() < 0.5:
        time = _old_leader_again(run, time)
    for name in rng.sample(sorted(run.old), len(run.old)):
        for _ in range(rng.randint(0, 2)):
            run.at(time + rng.random() * TIMEOUT, run.enroll)
        run.at(time, rng.choice((run.leave, run.crash)), name)
        time += rng.random() * TIMEOUT
    run.at(time, run.pin_somewhere)
    for name in sorted(run.old):
        run.at(time, run.replace, name)
    run.faults_end += 2 * TIMEOUT


def _old_leader_again(run: Run, time: float) -> float:
    """All old nodes are found dead and come back; when those that are older by then have gone, one
    of them leads again, beside a new one.
    """
    for name in sorted(run.old):
        run.at(time, run.pause, 1.3 * TIMEOUT, name)
    run.at(time + 1.5 * TIMEOUT, run.spawn, 'late')
    time += (2 + run.world.rng.random()) * TIMEOUT
    for name in run.names:
        if name not in run.old:
            run.at(time, run.leave, name)
    return time + TIMEOUT / 2
