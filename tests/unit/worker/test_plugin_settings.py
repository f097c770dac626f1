"""Settings of the plugins: where they come from, and that each bad one is named with its remedy,
never the password.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from jobsync_core.config import CoordinationConfig
from jobsync_core.errors import ConfigurationError, JobSyncError
from jobsync_core.worker.settings import PluginSettings

URL = 'postgresql://u:s3cret@db:6000/shop'


def read(
    values: dict[str, Any] | None = None, environ: dict[str, str] | None = None
) -> PluginSettings:
    return PluginSettings.read({'database_url': URL, **(values or {})}, environ or {})


def test_the_defaults_are_those_of_the_documents() -> None:
    found = read()
    assert {
        item.name: getattr(found, item.name)
        for item in dataclasses.fields(found)
        if item.name != 'config'
    } == {
        'node_name': None,
        'weight': 1.0,
        'wait_on_enter': 0.0,
        'wait_on_exit': 0.0,
        'lock_provider': None,
        'clear_existing_locks': False,
        'on_rebalance': None,
        'on_release': None,
        'required': True,
        'coordinate': 'keyed',
        'affinity': True,
        'pins': {},
        'pin_slots': 64,
        'queue_groups': {},
        'on_unclaimed': 'forward',
        'max_hops': 4,
        'park_sec': 2.0,
        'route_producers': True,
        'application': '',
        'http': None,
        'resume': False,
        'wait_for_database_sec': 60.0,
    }
    assert found.config.total_tokens == 1_000_000


class TestDatabase:
    def check(self, config: CoordinationConfig) -> None:
        assert (config.user, config.password, config.host, config.port, config.dbname) == (
            'u',
            's3cret',
            'db',
            '6000',
            'shop',
        )

    def test_from_database_url(self) -> None:
        self.check(read().config)

    def test_from_the_environment(self) -> None:
        self.check(PluginSettings.read({}, {'JOBSYNC_DATABASE_URL': URL}).config)

    def test_what_is_given_wins_over_the_environment(self) -> None:
        self.check(read(environ={'JOBSYNC_DATABASE_URL': 'postgresql://other/other'}).config)

    def test_from_fields(self) -> None:
        found = PluginSettings.read(
            {'host': 'h', 'port': 7000, 'user': 'x', 'total_tokens': 50}, {}
        ).config
        assert (found.host, found.port, found.user, found.total_tokens) == ('h', 7000, 'x', 50)

    @pytest.mark.parametrize(
        ('name', 'field'), [('JOBSYNC_HOST', 'host'), ('JOBSYNC_DBNAME', 'dbname')]
    )
    def test_from_fields_in_the_environment(self, name: str, field: str) -> None:
        assert getattr(PluginSettings.read({}, {name: 'there'}).config, field) == 'there'

    def test_from_a_config(self) -> None:
        config = CoordinationConfig(host='h', total_tokens=7)
        assert (
            PluginSettings.read({'config': config}, {'JOBSYNC_DATABASE_URL': URL}).config is config
        )

    def test_fields_complete_the_url(self) -> None:
        found = read({'appname': 'Shop_', 'total_tokens': 500}).config
        assert (found.appname, found.total_tokens, found.host) == ('shop_', 500, 'db')

    def test_fields_in_the_environment_complete_the_url(self) -> None:
        found = read(
            environ={
                'JOBSYNC_APPNAME': 'env_',
                'JOBSYNC_TOTAL_TOKENS': '600',
                'JOBSYNC_LISTEN': 'no',
            }
        ).config
        assert (found.appname, found.total_tokens, found.listen) == ('env_', 600, False)

    @pytest.mark.parametrize('values', [{}, {'weight': 2.0}, {'appname': 'a_'}])
    def test_without_any_the_remedy_is_named(self, values: dict[str, Any]) -> None:
        with pytest.raises(ConfigurationError, match='JOBSYNC_DATABASE_URL') as caught:
            PluginSettings.read(values, {})
        assert 'database_url=postgresql://' in str(caught.value)

    @pytest.mark.parametrize(
        'values',
        [
            {'config': CoordinationConfig(), 'database_url': URL},
            {'config': CoordinationConfig(), 'appname': 'x_'},
            {'config': URL},
            {'config': {'host': 'h'}},
        ],
    )
    def test_one_way_of_naming_it_excludes_the_others(self, values: dict[str, Any]) -> None:
        with pytest.raises(
            ConfigurationError, match='config: give a CoordinationConfig, and neither database_url'
        ):
            PluginSettings.read(values, {})


class TestEnvironment:
    @pytest.mark.parametrize(
        ('raw', 'name', 'value'),
        [
            ('2.5', 'weight', 2.5),
            ('3', 'wait_on_enter', 3.0),
            ('0', 'wait_on_exit', 0.0),
            ('7', 'pin_slots', 7),
            ('2', 'max_hops', 2),
            ('0.5', 'park_sec', 0.5),
            ('all', 'coordinate', 'all'),
            ('drop', 'on_unclaimed', 'drop'),
            ('off', 'affinity', False),
            ('no', 'required', False),
            ('TRUE', 'required', True),
            ('off', 'route_producers', False),
            ('1', 'clear_existing_locks', True),
            ('n7', 'node_name', 'n7'),
            (':9100', 'http', ':9100'),
        ],
    )
    def test_each_plain_setting_can_come_from_it(self, raw: str, name: str, value: object) -> None:
        environ = {f'JOBSYNC_{name.upper()}': raw}
        found = getattr(read(environ=environ), name)
        assert found == value and type(found) is type(value)

    @pytest.mark.parametrize(
        ('name', 'given'),
        [
            ('weight', 3.0),
            ('required', True),
            ('node_name', 'mine'),
            ('http', 80),
            ('coordinate', 'keyed'),
        ],
    )
    def test_what_is_given_wins(self, name: str, given: object) -> None:
        environ = {
            'JOBSYNC_WEIGHT': '9',
            'JOBSYNC_REQUIRED': 'false',
            'JOBSYNC_NODE_NAME': 'env',
            'JOBSYNC_HTTP': '9',
            'JOBSYNC_COORDINATE': 'all',
        }
        assert getattr(read({name: given}, environ), name) == given

    @pytest.mark.parametrize(
        ('name', 'raw', 'remedy'),
        [
            ('WEIGHT', 'heavy', 'give a number'),
            ('PIN_SLOTS', '6.5', 'give a number'),
            ('MAX_HOPS', '', 'give a number'),
            ('REQUIRED', 'maybe', 'give true or false'),
            ('ROUTE_PRODUCERS', '', 'give true or false'),
            ('TOTAL_TOKENS', 'many', 'give a number'),
            ('LISTEN', 'perhaps', 'give true or false'),
        ],
    )
    def test_a_bad_one_is_named_as_it_is_written(self, name: str, raw: str, remedy: str) -> None:
        with pytest.raises(ConfigurationError) as caught:
            read(environ={f'JOBSYNC_{name}': raw})
        assert f'JOBSYNC_{name}={raw!r}' in str(caught.value)
        assert remedy in str(caught.value)

    def test_what_is_not_ours_is_left_alone(self) -> None:
        assert read(environ={'JOBSYNC_ELSE': 'x', 'WEIGHT': 'x', 'PATH': '/'}) == read()


BAD: list[tuple[str, object, str]] = [
    *(
        ('weight', value, 'weight=')
        for value in (0, -1, '1', None, float('nan'), float('inf'), True)
    ),
    *(('wait_on_enter', value, 'wait_on_enter=') for value in (-1, 'x', None)),
    *(('wait_on_exit', value, 'wait_on_exit=') for value in (-0.1, 'x', None)),
    *(('park_sec', value, 'park_sec=') for value in (-1, '2', float('inf'))),
    *(
        ('pin_slots', value, 'give a whole number of at least 1')
        for value in (0, -1, 1.0, '64', True, None)
    ),
    *(('max_hops', value, 'give a whole number of at least 1') for value in (0, 2.5, False, None)),
    *(('coordinate', value, "use one of 'keyed', 'all'") for value in ('some', '', None, True)),
    *(('on_unclaimed', value, "use one of 'forward', 'drop'") for value in ('reject', None)),
    *(
        (name, value, 'give True or False')
        for name in ('required', 'route_producers', 'clear_existing_locks', 'affinity')
        for value in (1, 'yes', None)
    ),
    *(('pins', value, 'give a mapping such as') for value in (['a'], 'a', 5)),
    *(('total_tokens', value, 'give a whole number') for value in (0, '5', True)),
    ('appname', '1x', 'use a letter'),
    ('heartbeat_timeout_sec', 1, 'leaves no room'),
]


@pytest.mark.parametrize(('name', 'value', 'remedy'), BAD)
def test_a_value_that_cannot_work_is_named_with_its_remedy(
    name: str, value: object, remedy: str
) -> None:
    with pytest.raises(ConfigurationError) as caught:
        read({name: value})
    message = str(caught.value)
    assert name in message and repr(value) in message and remedy in message
    assert ': ' in message
    assert 's3cret' not in message
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize('name', ['', 5, 'a\0b', 'x' * 3000])
def test_a_node_name_that_cannot_be_one_is_refused(name: object) -> None:
    with pytest.raises((JobSyncError, TypeError, ValueError)):
        read({'node_name': name})


@pytest.mark.parametrize(
    ('name', 'near'),
    [
        ('wieght', 'weight'),
        ('databse_url', 'database_url'),
        ('total_token', 'total_tokens'),
        ('max_hop', 'max_hops'),
    ],
)
def test_a_misspelt_setting_is_pointed_out(name: str, near: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        read({name: 1})
    assert str(caught.value) == f'unknown setting {name!r}: did you mean {near!r}?'


def test_an_unknown_setting_that_is_like_none_is_refused_too() -> None:
    with pytest.raises(ConfigurationError, match=r"^unknown setting 'zzzz'$"):
        read({'zzzz': 1})


def test_pins_are_checked_and_kept_in_order() -> None:
    assert read({'pins': {'t': ['b', '%a']}}).pins == {'t': ('b', '%a')}


class TestPassword:
    def test_it_is_in_no_text_of_the_settings(self) -> None:
        found = read()
        assert 's3cret' not in repr(found) + str(found)

    @pytest.mark.parametrize(
        'url',
        [
            'mysql://u:s3cret@db/x',
            'postgresql://u:s3cret@db:port/x',
            'postgresql://u:s3cret@[::1/x',
            'postgresql://u:s3cret@db:99999/x',
            'u:s3cret@db',
            5,
        ],
    )
    def test_a_url_that_cannot_work_is_refused_without_it(self, url: object) -> None:
        for values, environ in (
            ({'database_url': url}, {}),
            ({}, {'JOBSYNC_DATABASE_URL': str(url)}),
        ):
            with pytest.raises(ConfigurationError) as caught:
                PluginSettings.read(values, environ)
            assert 's3cret' not in str(caught.value)

    @pytest.mark.parametrize('password', ['s3cret\0', b's3cret', ['s3cret']])
    def test_a_password_that_cannot_be_one_is_refused_without_it(self, password: object) -> None:
        with pytest.raises(ConfigurationError, match='password') as caught:
            read({'password': password})
        assert 's3cret' not in str(caught.value)


@pytest.mark.parametrize(('name', 'value'), [('coordinate', 'all'), ('on_unclaimed', 'drop')])
def test_without_affinity_what_sends_messages_to_their_owners_is_refused(
    name: str, value: str
) -> None:
    with pytest.raises(ConfigurationError) as caught:
        read({'affinity': False, name: value})
    text = str(caught.value)
    assert f'{name}={value!r}' in text and 'affinity=False' in text
    assert text.endswith('take one of the two out')
