"""Settings are checked where they are written down: the message names the value and the remedy,
never the password.
"""

from __future__ import annotations

import dataclasses
import math
import pickle
from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobsync_core.config import LEASE_FRACTION, MAX_TOKENS, CoordinationConfig
from jobsync_core.environment import ADAPTER_VARIABLES
from jobsync_core.errors import ConfigurationError, JobSyncError
from jobsync_core.secret import Secret
from jobsync_core.worker.settings import PluginSettings

quick = settings(deadline=None, max_examples=200)


def test_the_defaults_are_those_of_the_guide() -> None:
    config = CoordinationConfig()
    assert (config.host, config.port, config.dbname, config.user, config.password) == (
        'localhost',
        5432,
        'jobsync',
        'postgres',
        'postgres',
    )
    assert (config.appname, config.total_tokens, config.minimum_nodes) == ('sync_', 10_000, 1)
    assert (
        config.heartbeat_interval_sec,
        config.heartbeat_timeout_sec,
        config.rebalance_check_interval_sec,
    ) == (5, 15, 30)
    assert config.hash_function == 'double_sha256' and config.lease_sec == 15 * LEASE_FRACTION


@pytest.mark.parametrize(
    ('setting', 'value'),
    [
        ('host', ''),
        ('host', None),
        ('host', 'a\0b'),
        ('dbname', ''),
        ('user', 5),
        ('port', 0),
        ('port', 65536),
        ('port', True),
        ('port', 'x'),
        ('port', '5432,'),
        ('port', '1,2'),
        ('port', '9' * 5_000),
        ('port', None),
        ('port', 5432.0),
        ('listen', 'false'),
        ('listen', 0),
        ('listen', None),
        ('password', 5),
        ('password', 'a\0b'),
        ('appname', ''),
        ('appname', '1abc'),
        ('appname', 'a-b'),
        ('appname', 'a"b'),
        ('appname', 'a' * 41),
        ('appname', 'a\n'),
        ('appname', 'é'),
        ('total_tokens', 0),
        ('total_tokens', -1),
        ('total_tokens', MAX_TOKENS + 1),
        ('total_tokens', 1.5),
        ('total_tokens', True),
        ('total_tokens', '10'),
        ('minimum_nodes', 0),
        ('minimum_nodes', None),
        ('heartbeat_interval_sec', 0),
        ('heartbeat_interval_sec', -1),
        ('heartbeat_interval_sec', math.nan),
        ('heartbeat_interval_sec', '5'),
        ('heartbeat_timeout_sec', math.inf),
        ('heartbeat_timeout_sec', True),
        ('rebalance_check_interval_sec', 0),
        ('connect_timeout_sec', 0),
        ('connect_timeout_sec', 86_401),
        ('release_timeout_sec', -0.1),
        ('release_timeout_sec', None),
        ('hash_function', 'crc32'),
        ('hash_function', ''),
        ('hash_function', None),
    ],
)
def test_a_value_that_cannot_work_is_refused_by_name(setting: str, value: object) -> None:
    with pytest.raises(ConfigurationError, match=setting) as caught:
        CoordinationConfig(**{setting: value})  # type: ignore[arg-type]  # wrong on purpose
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, JobSyncError)
    assert ':' in str(caught.value) or 'must be' in str(caught.value), 'the message says what to do'


@pytest.mark.parametrize(
    ('setting', 'value'),
    [
        ('total_tokens', 1),
        ('total_tokens', MAX_TOKENS),
        ('port', 1),
        ('port', 65535),
        ('port', '6432'),
        ('appname', 'a' * 40),
        ('appname', '_'),
        ('release_timeout_sec', 0),
        ('release_timeout_sec', 0.5),
        ('password', None),
        ('password', ''),
        ('minimum_nodes', 500),
        ('hash_function', 'md5'),
        ('hash_function', 'sha256'),
        ('host', '/var/run/postgresql'),
    ],
)
def test_a_value_at_the_limits_is_accepted(setting: str, value: object) -> None:
    assert getattr(CoordinationConfig(**{setting: value}), setting) == value  # type: ignore[arg-type]  # mixed types


@pytest.mark.parametrize(
    ('interval', 'timeout', 'good'),
    [(5, 15, True), (0.2, 1, True), (5, 5, False), (9, 10, False), (8.9, 10, True)],
)
def test_a_lease_outlasts_the_heartbeat_interval(
    interval: float, timeout: float, good: bool
) -> None:
    if good:
        config = CoordinationConfig(heartbeat_interval_sec=interval, heartbeat_timeout_sec=timeout)
        assert config.heartbeat_interval_sec < config.lease_sec < config.heartbeat_timeout_sec
    else:
        with pytest.raises(ConfigurationError, match='three times the interval'):
            CoordinationConfig(heartbeat_interval_sec=interval, heartbeat_timeout_sec=timeout)


def test_the_prefix_is_folded_as_postgresql_folds_names() -> None:
    assert CoordinationConfig(appname='MyApp_').appname == 'myapp_'


def test_settings_cannot_be_changed_afterwards() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        CoordinationConfig().total_tokens = 5  # type: ignore[misc]


def test_neither_text_nor_errors_show_the_password() -> None:
    config = CoordinationConfig(password='s3cret', connection_options={'sslpassword': 's3cret'})
    assert 's3cret' not in repr(config) and 's3cret' not in str(config)
    for url in (
        'postgresql://u:s3cret@h:99999/db',
        'mysql://u:s3cret@h/db',
        'postgresql://u:s3cret@[::1/db',
        'postgresql://u:s3cret@h:x/db',
    ):
        with pytest.raises(ConfigurationError) as caught:
            CoordinationConfig.from_url(url)
        assert 's3cret' not in str(caught.value), url


@pytest.mark.parametrize(
    'url',
    [
        'postgresql://u:s3cret/pw@h/db',
        'postgresql://u:s3cret/p@w@h/db',
        'postgresql://u:p@s3cret/w@h/db',
        'postgresql://u:pw#s3cret@h/db',
        'postgresql://u:pw?s3cret@h/db',
        'postgresql://u:s3cret@h:5432:1/db',
        'postgresql://u:pw@h/db?s3cret',
        'postgresql://u:%s3cret@h/db',
        'postgresql://h:s3cret/db',
        'postgresql://u:pw\ns3cret@h/db',
        'postgresql://u:pw@h/s3cret/db',
        'postgresql://u:pw@h/s3cret:db',
        'postgresql:s3cret@h/db',
        'postgresql:/u:s3cret@h/db',
        's3cret',
        's3cret://u',
        's3cret:x',
        'postgresql+s3cret://u:s3cret@h/db',
        'host=h password=s3cret',
        'postgresql://u:pw@[s3cret]/db',
        'postgresql://u:pw@s3cret h/db',
        'postgresql://h/db?host=x&port=s3cret',
        'postgresql://u:pw@h/db?s3cret=1&=',
        'POSTGRESQL s3cret',
        'postgresql://u:a@s3cret:b@c:d/e',
    ],
)
def test_no_part_of_a_url_that_cannot_be_read_is_repeated(url: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        CoordinationConfig.from_url(url)
    error: BaseException | None = caught.value
    while error is not None:
        assert 's3cret' not in str(error).lower(), url
        assert error.__context__ is None or error.__suppress_context__
        error = error.__cause__
    assert 'postgresql' in str(caught.value) or 'percent-encoded' in str(caught.value), (
        'the message says what to do'
    )


@pytest.mark.parametrize('password', ['s3c[ret', 's3c]ret', '[s3cret'])
def test_a_bracket_in_a_password_is_to_be_percent_encoded(password: str) -> None:
    with pytest.raises(
        ConfigurationError, match=r'percent-encoded.*\[ as %5B, \] as %5D'
    ) as caught:
        CoordinationConfig.from_url(f'postgresql://u:{password}@localhost/x')
    assert 's3' not in str(caught.value)
    encoded = password.replace('[', '%5B').replace(']', '%5D')
    config = CoordinationConfig.from_url(f'postgresql://u:{encoded}@localhost/x')
    assert config.password == password


@quick
@given(st.text('ab:/@?#%[] =&,.S\n', max_size=30))
def test_whatever_is_given_as_a_url_is_read_or_refused_and_what_is_read_is_no_guess(
    rest: str,
) -> None:
    problem, config = '', None
    try:
        config = CoordinationConfig.from_url(f'postgresql://user:S3CRET{rest}@host/db')
    except ConfigurationError as error:
        problem = str(error)
    assert 'S3CRET' not in problem + repr(config)
    assert config is None or (config.user, config.host, config.dbname) == ('user', 'host', 'db')


@pytest.mark.parametrize('name', ['host', 'dbname', 'user'])
def test_a_url_in_the_place_of_a_part_is_refused_and_not_repeated(name: str) -> None:
    for value in (
        'postgresql://u:s3cret@h:5432/db',
        *(('u:s3cret@h', 'a,u:s3cret@h')[: 3 * (name == 'host')]),
    ):
        with pytest.raises(ConfigurationError, match=name) as caught:
            CoordinationConfig(**{name: value})  # type: ignore[arg-type]  # a URL is no part
        assert 's3cret' not in str(caught.value)


def test_sockets_may_have_an_at_sign() -> None:
    for host in ('@abstract', '/run/a@b', 'a, /run/a@b'):
        assert CoordinationConfig(host=host).host == host


def test_a_password_is_a_secret_wherever_it_is_kept() -> None:
    config = CoordinationConfig(
        password='s3cret', connection_options={'sslpassword': 's3cret', 'sslmode': 'require'}
    )
    for shown in (
        repr(config.password),
        repr(dataclasses.asdict(config)),
        repr(vars(config)),
        f'{config.connection_options}',
    ):
        assert 's3cret' not in shown
    assert config.password == 's3cret' and f'{config.password}' == 's3cret', (
        'whoever asks for it as text gets it'
    )
    assert config.connection_options == {'sslpassword': 's3cret', 'sslmode': 'require'}
    assert isinstance(pickle.loads(pickle.dumps(config)).password, Secret)


@pytest.mark.parametrize('options', ['sslmode=require', [('sslmode', 'require')], {1: 'x'}])
def test_connection_options_are_a_dict_of_names(options: object) -> None:
    with pytest.raises(ConfigurationError, match='connection_options'):
        CoordinationConfig(connection_options=options)  # type: ignore[arg-type]  # wrong on purpose


@pytest.mark.parametrize(
    'name', ['host', 'port', 'dbname', 'user', 'password', 'client_encoding', 'service']
)
def test_an_option_that_would_be_overridden_is_refused_by_its_name(name: str) -> None:
    with pytest.raises(ConfigurationError, match=f'connection_options names {name!r}') as caught:
        CoordinationConfig(connection_options={'sslmode': 'require', name: 's3cret'})
    assert 's3cret' not in str(caught.value)
    with pytest.raises(ConfigurationError, match=f'connection_options names {name!r}'):
        CoordinationConfig.from_url('postgresql://h/db', connection_options={name: 's3cret'})


def test_a_url_may_name_the_same_in_its_query() -> None:
    config = CoordinationConfig.from_url(
        'postgresql:///db?host=/run/pg&user=u&password=s3cret&sslmode=require'
    )
    assert (config.host, config.user, config.password) == ('/run/pg', 'u', 's3cret')
    assert config.connection_options == {'sslmode': 'require'}


def test_options_beside_a_url_are_added_to_those_in_it() -> None:
    config = CoordinationConfig.from_url(
        'postgresql://h/db?sslmode=require&keepalives=0',
        connection_options={'sslmode': 'verify-full', 'sslcrl': '/x'},
    )
    assert config.connection_options == {
        'sslmode': 'verify-full',
        'keepalives': '0',
        'sslcrl': '/x',
    }


def test_a_connect_timeout_among_the_options_is_the_one_that_counts() -> None:
    assert CoordinationConfig(connection_options={'connect_timeout': '3'}).connect_timeout_sec == 3
    assert (
        CoordinationConfig.from_url('postgresql://h/db?connect_timeout=3').connect_timeout_sec == 3
    )
    given = CoordinationConfig.from_url(
        'postgresql://h/db?connect_timeout=3', connect_timeout_sec=7
    )
    assert given.connect_timeout_sec == 7 and given.connection_options == {}, (
        'keywords win over the URL'
    )
    for wrong in ('s3cret', '', None, '0'):
        with pytest.raises(ConfigurationError, match='connect_timeout'):
            CoordinationConfig(connection_options={'connect_timeout': wrong})  # type: ignore[dict-item]  # wrong on purpose


def test_an_address_is_for_one_host() -> None:
    with pytest.raises(ConfigurationError, match='hostaddr'):
        CoordinationConfig(host='a,b', connection_options={'hostaddr': '127.0.0.1'})


@pytest.mark.parametrize('name', ['host', 'dbname', 'user'])
@pytest.mark.parametrize('value', ['a\nb', 'a\r', '\x1b[31mred', 'a\u2028b'])
def test_a_name_that_would_make_a_line_of_its_own_in_a_log_is_refused(
    name: str, value: str
) -> None:
    with pytest.raises(ConfigurationError, match='control characters') as caught:
        CoordinationConfig(**{name: value})  # type: ignore[arg-type]  # mixed types
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ('variable', 'meant'),
    [
        ('JOBSYNC_HEARTBEAT_TIMOUT_SEC', 'JOBSYNC_HEARTBEAT_TIMEOUT_SEC'),
        ('JOBSYNC_DATABASE_URI', 'JOBSYNC_DATABASE_URL'),
        ('JOBSYNC_TOTAL_TOKEN', 'JOBSYNC_TOTAL_TOKENS'),
        ('JOBSYNC_APP_NAME', 'JOBSYNC_APPNAME'),
        ('JOBSYNC_DB_NAME', 'JOBSYNC_DBNAME'),
        ('JOBSYNC_NODENAME', 'JOBSYNC_NODE_NAME'),
        ('JOBSYNC_MIN_NODES', 'JOBSYNC_MINIMUM_NODES'),
    ],
)
def test_a_misspelt_variable_is_refused_with_the_name_that_was_meant(
    variable: str, meant: str
) -> None:
    with pytest.raises(ConfigurationError, match=f'{variable}.*did you mean {meant}'):
        CoordinationConfig.from_env({variable: 's3cret'})
    shared = {variable.replace('JOBSYNC_', 'X_'): 'x'}
    assert CoordinationConfig.from_env(shared, prefix='X_') == CoordinationConfig(), (
        'another prefix may be shared with others'
    )


def test_a_variable_that_is_no_setting_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    environ = {'JOBSYNC_COLOUR_OF_THE_SHED': 's3cret', 'OTHER': 'x', 'jobsync_lower': 'x'}
    CoordinationConfig.from_env(environ)
    CoordinationConfig.from_env(environ)
    assert [record.getMessage() for record in caplog.records] == [
        (
            "the environment variable 'JOBSYNC_COLOUR_OF_THE_SHED' is no setting of JobSync and is "
            'ignored'
        )
    ]


def test_what_no_variable_gives_is_told_where_to_be_written(
    caplog: pytest.LogCaptureFixture,
) -> None:
    environ = {'JOBSYNC_CONNECTION_OPTIONS': 'password=s3cret'}
    assert CoordinationConfig.from_env(environ) == CoordinationConfig()
    assert [record.getMessage() for record in caplog.records] == [
        (
            "the environment variable 'JOBSYNC_CONNECTION_OPTIONS' is ignored: connection_options "
            'cannot be given by the environment; write them into the database URL, as in '
            '?sslmode=require'
        )
    ]


def test_what_kubernetes_sets_for_a_service_called_jobsync_is_no_setting(
    caplog: pytest.LogCaptureFixture,
) -> None:
    environ = {
        'JOBSYNC_SERVICE_HOST': '10.0.0.1',
        'JOBSYNC_SERVICE_PORT': '80',
        'JOBSYNC_PORT': 'tcp://10.0.0.1:80',
        'JOBSYNC_PORT_80_TCP': 'x',
        'JOBSYNC_PORT_80_TCP_ADDR': 'x',
        'JOBSYNC_SERVICE_PORT_HTTP': '80',
    }
    assert CoordinationConfig.from_env(environ) == CoordinationConfig() and not caplog.records


def test_the_variables_of_the_adapters_are_known() -> None:
    assert {
        item.name
        for item in dataclasses.fields(PluginSettings)
        if isinstance(item.default, (bool, int, float, str)) or item.name in ('node_name', 'http')
    } == ADAPTER_VARIABLES


def test_several_hosts_share_a_port_or_have_one_each() -> None:
    assert CoordinationConfig(host='a, b', port=5433).hosts == (('a', 5433), ('b', 5433))
    assert CoordinationConfig(host='a,b', port='5433,5434').hosts == (('a', 5433), ('b', 5434))
    assert CoordinationConfig().hosts == (('localhost', 5432),)


passwords = st.text(st.characters(exclude_characters='\0', codec='utf-8'), min_size=1, max_size=12)
#: A user or a database that is called like a URL is refused.
names = passwords.filter(lambda text: text.isprintable() and '://' not in text)


@quick
@given(names, passwords, names, st.integers(1, 65535))
def test_a_url_gives_back_what_was_quoted_into_it(
    user: str, password: str, dbname: str, port: int
) -> None:
    parts = [quote(part, safe='') for part in (user, password, dbname)]
    url = f'postgresql://{parts[0]}:{parts[1]}@db.example:{port}/{parts[2]}?sslmode=require'
    config = CoordinationConfig.from_url(url, total_tokens=500)
    assert (config.user, config.password, config.dbname, config.total_tokens) == (
        user,
        password,
        dbname,
        500,
    )
    assert config.hosts == (('db.example', port),) and config.connection_options == {
        'sslmode': 'require'
    }


@pytest.mark.parametrize(
    ('url', 'hosts', 'dbname'),
    [
        ('postgresql://a:1,b:2/db', (('a', 1), ('b', 2)), 'db'),
        ('postgres://a,b/db', (('a', 5432), ('b', 5432)), 'db'),
        ('postgresql://[::1]:6432/db', (('::1', 6432),), 'db'),
        ('postgresql:///db?host=/run/pg&port=6000', (('/run/pg', 6000),), 'db'),
        ('postgresql://%2Frun%2Fpg/db', (('/run/pg', 5432),), 'db'),
        ('postgresql://', (('localhost', 5432),), 'jobsync'),
        ('postgresql://h?dbname=other', (('h', 5432),), 'other'),
    ],
)
def test_the_forms_of_url_that_libpq_knows(
    url: str, hosts: tuple[tuple[str, int], ...], dbname: str
) -> None:
    config = CoordinationConfig.from_url(url)
    assert config.hosts == hosts and config.dbname == dbname
    assert config.password is None, (
        'a URL without a password has none: libpq looks into its password file'
    )


@pytest.mark.parametrize('url', ['', 'localhost', 'mysql://h/db', 'http://h', None, 5])
def test_what_is_no_database_url_is_refused(url: object) -> None:
    with pytest.raises(ConfigurationError, match='postgresql://'):
        CoordinationConfig.from_url(url)  # type: ignore[arg-type]  # wrong on purpose


def test_an_unknown_setting_is_refused_with_the_list_of_settings() -> None:
    with pytest.raises(ConfigurationError, match=r'total_token.*total_tokens'):
        CoordinationConfig.from_url('postgresql://h/db', total_token=5)


def test_the_environment_sets_fields_and_arguments_win() -> None:
    environ = {
        'JOBSYNC_TOTAL_TOKENS': '50000',
        'JOBSYNC_HEARTBEAT_INTERVAL_SEC': '0.5',
        'JOBSYNC_LISTEN': 'false',
        'JOBSYNC_HOST': 'a,b',
        'JOBSYNC_PORT': '1,2',
        'JOBSYNC_PASSWORD': '1234',
        'UNRELATED': 'x',
    }
    config = CoordinationConfig.from_env(environ, minimum_nodes=3)
    assert (
        config.total_tokens,
        config.heartbeat_interval_sec,
        config.listen,
        config.minimum_nodes,
    ) == (50_000, 0.5, False, 3)
    assert config.hosts == (('a', 1), ('b', 2)) and config.password == '1234'
    assert CoordinationConfig.from_env(environ, total_tokens=7).total_tokens == 7
    assert CoordinationConfig.from_env({}) == CoordinationConfig()
    assert CoordinationConfig.from_env({'X_APPNAME': 'mine_'}, prefix='X_').appname == 'mine_'


def test_a_url_in_the_environment_is_read_and_single_fields_win_over_it() -> None:
    environ = {'JOBSYNC_DATABASE_URL': 'postgresql://u:p@h:1/db', 'JOBSYNC_DBNAME': 'other'}
    config = CoordinationConfig.from_env(environ)
    assert (config.user, config.password, config.hosts, config.dbname) == (
        'u',
        'p',
        (('h', 1),),
        'other',
    )


@pytest.mark.parametrize(
    ('name', 'value'),
    [('TOTAL_TOKENS', 'many'), ('LISTEN', 'perhaps'), ('HEARTBEAT_TIMEOUT_SEC', '')],
)
def test_an_environment_value_that_cannot_be_read_is_refused_by_the_name_of_the_variable(
    name: str, value: str
) -> None:
    with pytest.raises(ConfigurationError, match='JOBSYNC_' + name):
        CoordinationConfig.from_env({'JOBSYNC_' + name: value})


@quick
@given(st.integers(1, 10**9), st.integers(1, 10**6))
def test_the_recommended_number_of_tokens_is_within_limits_and_grows(
    tasks: int, nodes: int
) -> None:
    tokens = CoordinationConfig.recommended_tokens(tasks, nodes)
    assert 10_000 <= tokens <= MAX_TOKENS
    assert tokens == MAX_TOKENS or tokens >= max(10 * tasks, 100 * nodes)
    assert (
        CoordinationConfig.recommended_tokens(tasks + 1, nodes)
        >= tokens
        <= CoordinationConfig.recommended_tokens(tasks, nodes + 1)
    )


@pytest.mark.parametrize(('tasks', 'nodes'), [(0, 1), (1, 0), (True, 1), (1.5, 1), (1, None)])
def test_a_recommendation_needs_whole_numbers(tasks: object, nodes: object) -> None:
    with pytest.raises(ConfigurationError, match='whole number'):
        CoordinationConfig.recommended_tokens(tasks, nodes)  # type: ignore[arg-type]  # wrong on purpose
