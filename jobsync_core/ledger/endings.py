"""The ends of attempts: how they are recorded in the database, at once or later."""

from __future__ import annotations

from .. import clock
from ..errors import DatabaseRefused, DatabaseUnavailable, Fenced, NotCommitted
from ..logs import Repeats, get_logger
from ..store.completions import LOST
from .calls import LedgerCalls
from .state import Unsettled

__all__ = ['Endings']

logger = get_logger(__name__)


class Endings:
    """Records how attempts end.

    Args:
        calls: Where it is recorded.
    """

    def __init__(self, calls: LedgerCalls) -> None:
        self._calls = calls
        self._repeats = Repeats()

    def finish(self, mine: Unsettled) -> None:
        """Record that the attempt completed, unless a transaction of the user's did.

        Raises:
            Fenced: Another attempt has taken the key over.
            DatabaseUnavailable: The completion is not known to be recorded.
            NotCommitted: The transaction that `complete` wrote into was rolled back, or is still
                open.
        """
        if mine.in_users_transaction:
            self._check_committed(mine)
        elif not mine.completed:
            self._complete(mine)
        try:
            self._put_result(mine)
        except DatabaseUnavailable as error:
            self._say('key=%s completed, and its result is not recorded yet: %s%s', mine.key, error)
        else:
            mine.settled = True

    def fail(self, mine: Unsettled) -> None:
        """Record that the attempt failed, so that anybody may begin the next one at once. Raises
        nothing: the error of its work goes on.
        """
        try:
            mine.settled = self._end(mine)
        except DatabaseUnavailable as trouble:
            self._say('key=%s failed, which could not be recorded yet: %s%s', mine.key, trouble)

    def record(self, mine: Unsettled) -> bool:
        """Record the end of an attempt later, in the background; False while a transaction that may
        complete it is open.

        Raises:
            DatabaseUnavailable: It is still not recorded.
        """
        if not mine.began:
            return True
        if not mine.succeeded or mine.in_users_transaction or mine.completed:
            return self._end(mine)
        finished = self._calls.finish(mine.completion)
        more = self._repeats.say('recorded', clock.now())
        if more is not None:
            logger.info(
                'key=%s recorded=%s after the database had been away%s', mine.key, finished, more
            )
        return True

    def release(self, mine: Unsettled) -> None:
        """Let go of an attempt that is not known to have begun, if it has."""
        holder = mine.holder
        if holder is not None:
            self._calls.release(
                holder.node,
                holder.incarnation,
                holder.process.pid,
                'begun, but the database did not answer',
                mine.retention_sec,
                mine.key,
            )

    def _end(self, mine: Unsettled) -> bool:
        """Record that the attempt failed, or, where a transaction of the user's has completed it,
        its result; False while such a transaction is open.
        """
        state = self._settle(mine)
        if state == 'done':
            self._put_result(mine)
        return state != 'running'

    def _settle(self, mine: Unsettled) -> str | None:
        return self._calls.settle(mine.key, mine.fence, mine.error, mine.retention_sec)

    def _complete(self, mine: Unsettled) -> None:
        completion = mine.completion
        try:
            finished = self._calls.finish(completion)
        except DatabaseUnavailable as error:
            said = (
                f'{mine.key!r} was executed, but the database could not record its '
                f'completion ({error}); '
                'it is tried again in the background, and until it succeeds another attempt may run'
            )
            if isinstance(error, DatabaseRefused):
                raise DatabaseRefused(said, error.sqlstate, error.pause) from error
            raise type(error)(said) from error
        if not finished:
            mine.settled = True
            raise Fenced(
                f'another attempt has taken the key {mine.key!r} over; this one (fence '
                f'{mine.fence}) is not recorded'
            )
        mine.complete(completion.result)
        mine.put(completion.result)

    def _check_committed(self, mine: Unsettled) -> None:
        mine.error = 'the transaction that complete() wrote into was rolled back'
        state = self._settle(mine)
        mine.settled = state in ('failed', None)
        if state == 'running':
            raise NotCommitted(
                f'{mine.key!r}: the transaction that complete() wrote into is still open, '
                'and may be rolled back yet: commit it '
                'before the function returns, or put @exactly_once around what commits'
            )
        if state == 'failed':
            raise NotCommitted(f'{mine.key!r}: {mine.error}; the key may run again')
        if state is None:
            raise Fenced(f'another attempt has taken the key {mine.key!r} over')

    def _put_result(self, mine: Unsettled) -> None:
        if mine.owes_result:
            result = mine.encoded
            if result is None and not mine.succeeded:
                result = LOST  # it did not come to its return: None would be a guess
            self._calls.put_result(mine.key, mine.fence, result)
            mine.put(result)

    def _say(self, line: str, key: str, error: Exception) -> None:
        """An outage concerns all keys: it is told once, then once a minute with the number of those
        between.
        """
        more = self._repeats.say(line, clock.now())
        if more is not None:
            logger.warning(line, key, error, more)
