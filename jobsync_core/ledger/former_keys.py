"""Keys of calls that earlier versions recorded under other names: what is complete stays so."""

from __future__ import annotations

from collections.abc import Sequence

from .. import clock
from .calls import LedgerCalls
from .keys import Former

__all__ = ['FormerKeys']

#: Seconds until it is looked again whether there are keys under a prefix of an earlier version.
_PREFIX_SEC = 60.0


class FormerKeys:
    """Looks for former keys. Threads may share it.

    Args:
        calls: Where they are looked for.
    """

    def __init__(self, calls: LedgerCalls) -> None:
        self._calls = calls
        self._prefixes: dict[str, tuple[float, bool]] = {}

    def find(self, former: Sequence[Former]) -> tuple[str, str | None] | None:
        """State and result of a call that is recorded under one of its former keys.

        Nothing is asked for again within a minute under a prefix that no key has any more.

        Raises:
            DatabaseUnavailable: It is not known.
        """
        wanted = [each for each in former if self._may_exist(each.prefix)]
        if not wanted:
            return None
        return self._calls.find(
            [each.key for each in wanted], [each.key for each in wanted if each.ambiguous]
        )

    def _may_exist(self, prefix: str) -> bool:
        if not prefix:
            return True
        now = clock.now()
        known = self._prefixes.get(prefix)
        if known is None or now - known[0] > _PREFIX_SEC:
            known = self._prefixes[prefix] = now, self._calls.has_prefix(prefix)
        return known[1]
