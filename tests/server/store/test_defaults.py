"""Whatever a server, a database or a role has as its defaults: each transaction of JobSync's
carries what it needs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from jobsync_core import CoordinationConfig, Job
from jobsync_core.store.schema import create_schema
from tests.support.cluster import query
from tests.support.whole import admin_of, use_everything

MakeConfig = Callable[..., CoordinationConfig]

_DEFAULTS = {
    'isolation': {
        'default_transaction_isolation': 'serializable',
        'default_transaction_deferrable': 'on',
        'synchronous_commit': 'off',
    },
    'read only': {
        'default_transaction_read_only': 'on',
        'default_transaction_isolation': 'repeatable read',
    },
    'forms': {
        'DateStyle': 'SQL, DMY',
        'IntervalStyle': 'sql_standard',
        'TimeZone': 'America/St_Johns',
        'bytea_output': 'escape',
        'standard_conforming_strings': 'off',
        'extra_float_digits': '-15',
        'array_nulls': 'off',
        'row_security': 'off',
    },
    'limits': {
        'statement_timeout': '1ms',
        'lock_timeout': '1ms',
        'idle_in_transaction_session_timeout': '60ms',
        'idle_session_timeout': '300ms',
    },
}


@pytest.mark.parametrize('listen', [True, False])
@pytest.mark.parametrize('name', _DEFAULTS)
def test_everything_works_with_odd_defaults(
    make_config: MakeConfig, listen: bool, name: str
) -> None:
    config = make_config(listen=listen)
    with admin_of(config) as admin:
        for setting, value in _DEFAULTS[name].items():
            admin(f'ALTER DATABASE "{config.dbname}" SET {setting} = %s', value)
        use_everything(config, admin)


@pytest.mark.parametrize('listen', [True, False])
def test_no_key_stays_running_where_the_default_is_serializable(
    make_config: MakeConfig, listen: bool
) -> None:
    config = make_config(listen=listen)
    query(
        config, f'ALTER DATABASE "{config.dbname}" SET default_transaction_isolation = serializable'
    )
    create_schema(config)
    with Job('n1', config, wait_on_enter=0) as job:
        for number in range(20):
            with (
                job.once(f'key {number}') as execution,
                execution.transaction() as connection,
                connection.cursor() as cursor,
            ):
                cursor.execute('SHOW transaction_isolation')
                assert cursor.fetchone() == ('read committed',)
        assert query(config, 'SELECT state, count(*) FROM "{}execution" GROUP BY 1') == [
            ('done', 20)
        ]


@pytest.mark.parametrize('listen', [True, False])
def test_a_transaction_of_jobsync_s_own_may_pause_for_longer_than_the_default_lets_it(
    make_config: MakeConfig, listen: bool
) -> None:
    config = make_config(listen=listen)
    create_schema(config)
    query(
        config,
        f'ALTER DATABASE "{config.dbname}" SET idle_in_transaction_session_timeout = \'60ms\'',
    )
    with (
        Job('n1', config, wait_on_enter=0) as job,
        job.session(pinned=True) as connection,
        connection.cursor() as cursor,
    ):
        cursor.execute('SELECT 1')
        threading.Event().wait(
            0.3
        )  # as on a busy machine; the server would have ended the session by now
        cursor.execute('SELECT 2')
        assert cursor.fetchone() == (2,)
