"""A key of which too many attempts were lost is dead: nothing begins it until it is freed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from jobsync_core import CoordinationConfig, Job
from jobsync_core.errors import AttemptsExhausted, ConfigurationError, NotSent
from jobsync_core.executions import ExecutionFilter, Executions
from jobsync_core.ledger.cluster import ClusterLedger
from jobsync_core.ledger.once import exactly_once, once
from jobsync_core.process import this_process
from jobsync_core.store.executions import Holder
from tests.support import attempts as by_hand
from tests.support.ledgers import state_of
from tests.support.rows import Rows


@pytest.fixture
def executions(config: CoordinationConfig, rows: Rows) -> Iterator[Executions]:
    with Executions(config) as made:
        yield made


def lose(rows: Rows, ledger: ClusterLedger, key: str = 'k') -> None:
    """An attempt of a process elsewhere, whose node is gone."""
    process = dataclasses.replace(this_process(), host='elsewhere')
    assert ledger._calls.begin(key, Holder('a', 'life of a', process)).began
    rows.run(f"UPDATE {rows.tables.execution} SET incarnation = 'a former one'")


def lose_all(rows: Rows, ledger: ClusterLedger, key: str = 'k', most: int = 1) -> None:
    """Let a key be dead."""
    for _ in range(most):
        lose(rows, ledger, key)
    with pytest.raises(AttemptsExhausted):
        by_hand.begin(ledger, key, max_lost=most)


class TestWhatBegins:
    @pytest.mark.parametrize(('given', 'most'), [(None, 3), (1, 1), (5, 5)])
    def test_a_function_as_often_as_it_says_or_the_ledger(
        self, rows: Rows, ledger: ClusterLedger, given: int | None, most: int
    ) -> None:
        ledger.max_lost = 3
        calls: list[int] = []

        @exactly_once(key='{n}', scope='f', max_lost=given)
        def work(n: int) -> None:
            calls.append(n)

        for _ in range(most):
            lose(rows, ledger, 'f:1')
        for _ in range(2):
            with pytest.raises(AttemptsExhausted, match=r"'f:1' is dead") as raised:
                work(1)
            assert (raised.value.key, raised.value.lost) == ('f:1', most)
        assert calls == []
        work(2)
        assert calls == [2]

    def test_any_number_where_there_is_no_limit(self, rows: Rows, ledger: ClusterLedger) -> None:
        ledger.max_lost = 3
        for _ in range(6):
            lose(rows, ledger)
        assert by_hand.begin(ledger, 'k', max_lost=0).attempts == 7

    def test_a_block_as_often_as_its_job_says(
        self, config: CoordinationConfig, rows: Rows, ledger: ClusterLedger
    ) -> None:
        for _ in range(2):
            lose(rows, ledger)
        with Job('n1', dataclasses.replace(config, max_lost=2), wait_on_enter=0) as job:
            with pytest.raises(AttemptsExhausted), job.once('k'):
                pass
            with job.once('l'):
                pass

    @pytest.mark.parametrize('wrong', [-1, True, '3', 1.5])
    def test_what_is_no_number_is_refused_by_its_name(self, wrong: Any) -> None:
        with pytest.raises(ConfigurationError, match='max_lost'):
            exactly_once(key='{n}', scope='f', max_lost=wrong)(lambda n: n)
        with pytest.raises(ConfigurationError, match='max_lost'):
            CoordinationConfig(max_lost=wrong)


class TestWhatAnOperatorDoes:
    def test_a_dead_key_is_listed_and_begins_again_when_it_is_retried(
        self, rows: Rows, ledger: ClusterLedger, executions: Executions
    ) -> None:
        lose_all(rows, ledger, most=2)
        (found,) = executions.find(ExecutionFilter(state='dead'))
        assert (found['key'], found['lost'], found['expires_at']) == ('k', 2, None)
        found = executions.retry('k')
        assert (found['state'], found['lost']) == ('failed', 0)
        assert found['expires_at'] is not None
        assert [each['number'] for each in executions.show('k')['history']] == [1, 2]
        lose_all(rows, ledger, most=2)

    @pytest.mark.parametrize('how', ['forget', 'purge'])
    def test_it_is_deleted_as_any_other(
        self, rows: Rows, ledger: ClusterLedger, executions: Executions, how: str
    ) -> None:
        lose_all(rows, ledger)
        if how == 'forget':
            executions.forget('k')
        else:
            assert executions.purge(ExecutionFilter(state='dead')) == 1
        assert state_of(rows, 'k') is None

    def test_its_message_is_kept_once_and_sent_by_retry(
        self, rows: Rows, ledger: ClusterLedger, config: CoordinationConfig
    ) -> None:
        lose_all(rows, ledger)
        for number in (1, 2):
            assert ledger.keep('k', json.dumps({'framework': 'x', 'number': number}))
        sent: list[Mapping[str, Any]] = []
        with Executions(config) as executions:
            assert not executions.sends
            found = executions.retry('k')
            assert found['message'] is not None and found['expires_at'] is None
        with Executions(config, sent.append) as executions:
            assert executions.retry('k')['message'] is not None
            assert sent == [{'framework': 'x', 'number': 1}]
            with once(ledger, 'k'):
                pass
            assert executions.show('k')['message'] is None

    def test_a_message_that_cannot_be_sent_stays(
        self, rows: Rows, ledger: ClusterLedger, config: CoordinationConfig
    ) -> None:
        lose_all(rows, ledger)
        ledger.keep('k', '{}')

        def refuse(document: object) -> None:
            raise OSError('the broker is away')

        with Executions(config, refuse) as executions:
            with pytest.raises(NotSent, match='the broker is away'):
                executions.retry('k')
            found = executions.show('k')
            assert (found['state'], found['message']) == ('failed', '{}')

    def test_of_a_key_that_is_not_dead_no_message_is_kept(
        self, rows: Rows, ledger: ClusterLedger, executions: Executions
    ) -> None:
        with once(ledger, 'k'):
            assert not ledger.keep('k', '{}')
        assert not ledger.keep('nobody', '{}')
        assert executions.show('k')['message'] is None
