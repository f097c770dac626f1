"""A fence of the protocol or of the store that is switched off."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from .invariants import Violation
from .scenarios import run

__all__ = ['Mutation']


@dataclass(frozen=True)
class Mutation:
    """One fence, how it is switched off, which families of schedules show it, and what they must
    report.
    """

    fence: str
    families: tuple[str, ...]
    apply: Callable[[pytest.MonkeyPatch], None]
    reports: tuple[str, ...]
    schedules: int = 300

    def must_be_noticed(self, patch: pytest.MonkeyPatch) -> None:
        """Play schedules without the fence until one breaks an invariant."""
        self.apply(patch)
        for seed in range(self.schedules):
            for family in self.families:
                try:
                    run(seed, family)
                except Violation as violation:
                    if not str(violation.__cause__).startswith(self.reports):
                        pytest.fail(f'found, but by another invariant: {violation}')
                    return
        pytest.fail(
            f'{self.schedules * len(self.families)} schedules of {self.families} did not notice'
        )
