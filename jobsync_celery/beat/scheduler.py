"""Celery's beat scheduler on top of PostgreSQL: which slots are due, who sends them, and what is
recorded. The folder says what is promised.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Any, NoReturn

from celery.beat import ScheduleEntry, Scheduler, SchedulingError
from celery.schedules import crontab

from jobsync_core import clock
from jobsync_core.errors import DatabaseUnavailable, JobSyncError
from jobsync_core.store.schedules import ActiveScheduler, ScheduleStore, State
from jobsync_core.store.schema import create_schema
from jobsync_core.store.sessions import Sessions
from jobsync_core.store.tables import Tables

from ..application import read_config
from ..broker.publisher import BrokerAway, Publisher
from ..logs import get_logger
from .slots import newest_slot, slot_id, slots_after

__all__ = ['JobSyncScheduler']

logger = get_logger(__name__)

#: Seconds between two attempts to become the leader, to reach the database or to reach the broker,
#: at most.
_RETRY_SEC = 1.0
#: Seconds until the next look at a row that another scheduler holds.
_BUSY_SEC = 0.1
#: Seconds that reaching the broker, or one message, may take, at most.
_BROKER_SEC = 5.0
_PRUNE_EVERY_SEC = 3600.0
_UNUSED_SEC = 86_400.0
_AHEAD = timedelta(minutes=1)


class _TooLate(BrokerAway):
    """The row's lock may be lost, so that another scheduler may be sending the slot."""


@dataclass(frozen=True)
class _Due:
    """When an entry is due next, and what that was reckoned from."""

    rule: Any
    slot: datetime
    at: datetime | None


class JobSyncScheduler(Scheduler):  # type: ignore[misc]  # Celery has no types
    """Celery's scheduler with its state in PostgreSQL, so that any number of them may run."""

    def __init__(self, app: Any, *args: Any, lazy: bool = False, **kwargs: Any) -> None:
        self._slots: dict[str, State] = {}
        self._due: dict[str, _Due] = {}
        self._unrecorded: dict[str, datetime] = {}
        self._is_active: bool | None = None
        self._proved = float('-inf')
        self._pruned = float('-inf')
        self._trouble: dict[str, str] = {}
        self._hold_until = 0.0
        self._collects = False
        self._failed: Exception | None = None
        try:
            self._config = read_config(app)
        except JobSyncError as error:
            _refuse(error)
        self._tables = Tables.of(self._config)
        self._sessions = Sessions(self._config, 'beat')
        self._active = ActiveScheduler(self._config, self._tables)
        self._retry = min(_RETRY_SEC, self._config.heartbeat_interval_sec)
        super().__init__(app, *args, lazy=lazy, **kwargs)
        limit = min(_BROKER_SEC, max(1.0, self._config.heartbeat_timeout_sec / 3))
        self._publisher = Publisher(app, self.Producer, limit, self._check_hold)

    def setup_schedule(self) -> None:
        """Read the configuration; make sure that the database is there.

        Raises:
            SystemExit: It is not, or it refuses.
        """
        self.merge_inplace(self.app.conf.beat_schedule)
        self.install_default_entries(self.schedule)
        try:
            with self._sessions.session() as connection:
                create_schema(connection, self._config)
        except JobSyncError as error:
            _refuse(error)

    def tick(self, *args: Any, **kwargs: Any) -> float:
        """Send what is due, if this is the active scheduler; the seconds until the next tick."""
        try:
            wait = self._tick()
        except DatabaseUnavailable as error:
            self._complain('database', 'nothing is sent until the database is back', error)
            self._step_down()
            return self._retry
        self._relieve('database')
        return wait

    def close(self) -> None:
        """Let another scheduler take over at once."""
        self._step_down()
        self._sessions.close_all()
        self._publisher.close()
        super().close()

    @property
    def info(self) -> str:
        """For the banner."""
        places = ', '.join(f'{host}:{port}' for host, port in self._config.hosts)
        return f'    . db -> {places}/{self._config.dbname} (tables {self._config.appname}*)'

    def _tick(self) -> float:
        if not self._leads():
            return self._retry
        self._learn()
        due, wait = self._look()
        if due:
            wait = 0.0
        for entry in due:
            if not self._leads():
                return self._retry
            try:
                if not self._send(entry):
                    wait = _BUSY_SEC
            except BrokerAway as error:
                return self._broker_failed(error)
        return wait

    def _leads(self) -> bool:
        """Whether this is the active scheduler, to its knowledge: the rows do not rely on it."""
        now = clock.now()
        if self._is_active and now - self._proved < self._config.heartbeat_interval_sec / 2:
            return True
        held = self._active.hold()
        if held != self._is_active:
            logger.info(
                'beat: %s is the active one', 'this scheduler' if held else 'another scheduler'
            )
            self._slots.clear()
        self._is_active, self._proved = held, now
        return held

    def _learn(self) -> None:
        """Know the last slot of every entry."""
        unknown = [
            (name, _now(entry), _describe(entry))
            for name, entry in self.schedule.items()
            if name not in self._slots
        ]
        if unknown:
            with self._sessions.session() as connection:
                found = ScheduleStore(connection, self._tables).learn(unknown)
            for name, now, _ in unknown:
                if name in found:
                    self._adopt(name, found[name])
                    if found[name].slot > now + _AHEAD:
                        logger.warning(
                            'beat: last slot of %r is %s, though it is %s: is a clock wrong?',
                            name,
                            found[name].slot,
                            now,
                        )
        if clock.now() - self._pruned > _PRUNE_EVERY_SEC:
            with self._sessions.session() as connection:
                forgotten = ScheduleStore(connection, self._tables).prune(
                    list(self.schedule), _UNUSED_SEC
                )
            self._pruned = clock.now()
            if forgotten:
                logger.info('beat: forgot %d entries that are in the schedule no more', forgotten)

    def _look(self) -> tuple[list[ScheduleEntry], float]:
        """The entries that are due, the longest due first; and the seconds until the next look
        where none is.
        """
        due, wait = [], min(float(self.max_interval), self._config.heartbeat_interval_sec)
        for name in self._slots.keys() & self.schedule.keys():
            entry = self.schedule[name]
            try:
                at = self._next(name, entry)
                left = (at - _now(entry)).total_seconds() if at is not None else wait
            except Exception as error:  # one entry that cannot be reckoned must not stop the others
                self._complain(f'entry {name!r}', 'it is not sent', error)
                continue
            self._relieve(f'entry {name!r}')
            if at is not None and left <= 0:
                due.append((at, name))
            else:
                wait = min(wait, left)
        return [self.schedule[name] for _, name in sorted(due)], wait

    def _next(self, name: str, entry: ScheduleEntry) -> datetime | None:
        slot = self._slots[name].slot
        known = self._due.get(name)
        if known is None or known.slot != slot or known.rule is not entry.schedule:
            known = self._due[name] = _Due(
                entry.schedule, slot, next(slots_after(entry.schedule, slot), None)
            )
        return known.at

    def _send(self, entry: ScheduleEntry) -> bool:
        """Send the newest slot that is due, unless the row says that there is none: then another
        scheduler has sent it.

        Returns:
            False where that could not be seen yet.

        Raises:
            BrokerAway: The message is not known to be sent.
        """
        self._publisher.connect()  # not while holding a row
        with _undisturbed(), self._sessions.session() as connection:
            self._hold_until = clock.now() + self._config.lease_sec / 2
            state = ScheduleStore(connection, self._tables).lock(
                entry.name, self._config.heartbeat_timeout_sec
            )
            if (
                state is None
            ):  # another scheduler is sending it, or an administrator has deleted it: read it again
                self._slots.pop(entry.name, None)
                return False
            now = _now(entry)
            try:
                slot = newest_slot(entry.schedule, state.slot, now)
            except Exception as error:
                self._complain(f'slot of {entry.name!r}', 'it is not sent', error)
                return False
            if slot is not None:
                sent = self._is_wanted(entry, slot, now)
                if sent and self._unrecorded.get(entry.name) != slot:
                    self._publish(entry, slot)
                    self._unrecorded[entry.name] = slot
                ScheduleStore(connection, self._tables).advance(
                    entry.name, slot, _describe(entry), sent
                )
                state = State(slot, state.runs + sent)
        self._unrecorded.pop(entry.name, None)
        self._adopt(entry.name, state)
        return True

    def _is_wanted(self, entry: ScheduleEntry, slot: datetime, now: datetime) -> bool:
        deadline = self.app.conf.beat_cron_starting_deadline
        wanted = (
            deadline is None
            or not isinstance(entry.schedule, crontab)
            or (now - slot).total_seconds() <= deadline
        )
        if not wanted:
            logger.warning(
                'beat: %r is not sent for %s, which is longer ago than beat_cron_starting_deadline',
                entry.name,
                slot,
            )
        return wanted

    def _adopt(self, name: str, state: State) -> None:
        self._slots[name] = state
        entry = self.schedule[name]
        entry.last_run_at, entry.total_run_count = state.slot, state.runs

    def _publish(self, entry: ScheduleEntry, slot: datetime) -> None:
        """Send the task of a slot. As with Celery's own scheduler, one that cannot be sent for a
        reason of its own is reported, and over.

        Raises:
            BrokerAway: The message is not known to be sent.
        """
        task_id = slot_id(self._config.appname, entry.name, slot)
        headers = {**(entry.options.get('headers') or {}), 'jobsync_slot': slot.isoformat()}
        options = {**entry.options, 'task_id': task_id, 'headers': headers, 'retry': False}
        message = type(entry)(
            **{**dict(entry), 'options': options}
        )  # copy.copy would take the app from the schedule that both share
        logger.info('beat: %r: slot=%s id=%s', entry.name, slot.isoformat(), task_id)
        producer, self._failed = self._publisher.connect(), None
        # Not apply_async: Sentry, for its monitors of periodic tasks, and others like it wrap this
        # one.
        self._collects = True
        try:
            self.apply_entry(message, producer=producer)
        finally:
            self._collects = False
        error, self._failed = self._failed, None
        if error is None:
            self._relieve('broker')
        elif not isinstance(error, SchedulingError):
            raise error
        else:
            cause = error.__context__
            broker = self._publisher.errors
            self._publisher.close()
            if isinstance(cause, _TooLate):
                raise cause from None
            if isinstance(cause, broker):
                raise BrokerAway(str(cause)) from error
            logger.error('Message Error: %s', error, exc_info=error)

    def apply_async(self, *args: Any, **kwargs: Any) -> Any:
        """As Celery's; but `apply_entry`, which logs an error and goes on, does not hear of one."""
        try:
            return super().apply_async(*args, **kwargs)
        except Exception as error:
            if not self._collects:
                raise
            self._failed = error
            return None

    def _check_hold(self) -> None:
        if clock.now() > self._hold_until:
            raise _TooLate('it took too long to send a task: another scheduler may be sending it')

    def _broker_failed(self, error: BrokerAway) -> float:
        """Once more at once, over a new connection; if that fails too, another scheduler may reach
        the broker.
        """
        self._publisher.close()
        if isinstance(error, _TooLate):
            logger.warning('beat: %s', error)
            return 0.0
        if self._complain('broker', 'it is tried again', error):
            return 0.0
        self._step_down()
        return 2 * self._retry

    def _step_down(self) -> None:
        self._is_active = None
        self._slots.clear()
        self._active.resign()

    def _complain(self, what: str, consequence: str, error: Exception) -> bool:
        """Log a trouble, once; whether it is new."""
        if what in self._trouble:
            return False
        self._trouble[what] = str(error)
        logger.error(
            'beat: %s: %s (%s)',
            what,
            ' '.join(str(error).split()) or type(error).__name__,
            consequence,
        )
        return True

    def _relieve(self, what: str) -> None:
        if self._trouble.pop(what, None) is not None:
            logger.warning('beat: %s: all is well again', what)


def _now(entry: ScheduleEntry) -> datetime:
    now: datetime = entry.default_now()
    return (now if now.tzinfo is not None else entry.schedule.maybe_make_aware(now)).astimezone(
        timezone.utc
    )


def _describe(entry: ScheduleEntry) -> str:
    return f'{entry.task} {entry.schedule!r}'


def _refuse(error: Exception) -> NoReturn:
    """End the process with one line that an operator can use."""
    raise SystemExit(f'celery beat -S jobsync: {" ".join(str(error).split())}') from None


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Put off SIGTERM and SIGINT until the block ends: a slot that is sent is recorded as well."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number in tuple(before):
        signal.signal(number, lambda found, frame: caught.append(found))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        for received in caught:
            signal.raise_signal(received)
