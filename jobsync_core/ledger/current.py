"""Which ledger a call uses: that of the Job around it, or one that remembers nothing."""

from __future__ import annotations

from contextvars import ContextVar

from ..errors import NotEntered
from .interface import Ledger

__all__ = ['current_ledger', 'enter_ledger', 'leave_ledger', 'message_ledger', 'set_current_ledger']

# The ledgers of the Jobs that this process is in, in the order in which they were entered. Each
# step is one operation of the dictionary: without a lock, which a child that is forked at that
# moment would find taken for ever.
_entered: dict[int, Ledger] = {}
# Those that were entered in this context: threads that are in a Job each use their own.
_here: ContextVar[tuple[Ledger, ...]] = ContextVar('jobsync_ledgers', default=())


def enter_ledger(ledger: Ledger) -> None:
    """Make it the ledger of this context until `leave_ledger`; and of threads that have entered
    none, and of children forked meanwhile.
    """
    _entered.pop(id(ledger), None)
    _entered[id(ledger)] = ledger
    _here.set(
        (*(other for other in _here.get() if other is not ledger and id(other) in _entered), ledger)
    )


def leave_ledger(ledger: Ledger) -> None:
    """Use it no more; the Job around it, or another that is entered, goes on."""
    _entered.pop(id(ledger), None)


def set_current_ledger(ledger: Ledger | None) -> None:
    """Make `ledger` the only one of this process, and of the children that it forks from now on;
    None: it has none.
    """
    _entered.clear()
    if ledger is not None:
        enter_ledger(ledger)


def current_ledger() -> Ledger:
    """The ledger of the Job that was entered last in this context, or else in this process, and is
    not left yet.

    Raises:
        NotEntered: This process has entered no Job.
    """
    for ledger in reversed(_here.get()):
        if id(ledger) in _entered:
            return ledger
    entered = list(_entered.values())
    if not entered:
        raise NotEntered(
            'this process has entered no Job, so it cannot tell what was executed before: call '
            'this inside `with Job(...)`, '
            'or inside `with Job(name)` for single-node mode, where everything just runs'
        )
    return entered[-1]


def message_ledger() -> Ledger:
    """The ledger for a message that an adapter's worker is about to process.

    Raises:
        NotEntered: This process has entered no Job.
        ClaimLost, DatabaseRefused: Nothing may begin at the moment; see `Ledger.for_messages`.
    """
    return current_ledger().for_messages()
