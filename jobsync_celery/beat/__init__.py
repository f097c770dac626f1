"""A scheduler for `celery beat` without a single point of failure: `celery -A proj beat -S
jobsync`, on as many machines as you like.

One of them ticks; the others wait to take its place. What was sent last is a row per entry in
PostgreSQL. A slot is the moment at which an entry is due, reckoned from the slot before, so that
all schedulers know the same slots, and the id of a slot's task follows from the entry's name and
the slot.

- A slot is sent under its row's lock, and recorded before the lock is let go: no other scheduler
  sends it as well, whoever leads.
- A scheduler that dies between the sending and the record leaves a slot that is sent again, as a
  task *of the same id*; so does one that gets no answer from the broker, and one that is stopped in
  the instant between its last look at the clock and the sending, for longer than the heartbeat
  timeout. A task that is `@exactly_once` runs once even then.
- Slots that were missed (no scheduler, no database, no broker) are caught up with one task, for the
  newest of them; crontab entries only within `beat_cron_starting_deadline`, if that is set.
- A new entry counts from the moment at which a scheduler first sees it; a changed one from its last
  slot; one that is in no scheduler's configuration for a day is forgotten. All schedulers of a
  cluster (appname) must have the same entries.

The task finds its slot in the header `jobsync_slot`, in UTC.
"""

from .scheduler import JobSyncScheduler

__all__ = ['JobSyncScheduler']
