"""The node table as a leader reads it."""

from __future__ import annotations

import pytest

from jobsync_core.store.cluster_transaction import read_members


@pytest.mark.parametrize('weight', ['"NaN"', '"Infinity"'])
def test_a_weight_that_is_no_number_counts_as_one(weight: str) -> None:
    """PostgreSQL takes it, as both are greater than zero; one such row must not end all plans."""
    (member,) = read_members(f'[["a", "life", 1, 5000000, "active", {weight}, []]]')
    assert member.weight == 1.0 and member.created_on == 5.0
