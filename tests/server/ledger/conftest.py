"""What the tests of the ledger share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from jobsync_core.config import CoordinationConfig
from jobsync_core.ledger.cluster import ClusterLedger
from jobsync_core.ledger.current import set_current_ledger
from tests.support.ledger_process import connect
from tests.support.ledgers import MakeLedger, ledgers_of
from tests.support.rows import Rows, rows_of


@pytest.fixture
def rows(config: CoordinationConfig) -> Iterator[Rows]:
    """The tables, and one for effects."""
    with rows_of(config) as found:
        found.run('CREATE TABLE effect (key text)')
        yield found


@pytest.fixture
def make_ledger(rows: Rows) -> Iterator[MakeLedger]:
    """Makes ledgers, each of a node of its own with a row in the node table."""
    with ledgers_of(rows) as make:
        yield make


@pytest.fixture
def ledger(make_ledger: MakeLedger) -> Iterator[ClusterLedger]:
    """The current ledger, of the node `a`."""
    made = make_ledger('a')
    set_current_ledger(made)
    yield made
    set_current_ledger(None)


@pytest.fixture
def own(config: CoordinationConfig) -> Iterator[Any]:
    """A connection of the user's, with a transaction open."""
    connection = connect(config)
    connection.autocommit = False
    yield connection
    connection.close()
