"""Tasks without affinity: who decides, what contradicts it, and that there is no route."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from jobsync_core.config import CoordinationConfig
from jobsync_core.errors import ConfigurationError
from jobsync_core.ledger.once import ExactlyOnce, exactly_once
from jobsync_core.worker.adapter import CoordinatedTasks, Declared
from jobsync_core.worker.affinity import check_affinity, has_affinity
from jobsync_core.worker.incoming import Refused, Stamps, find_route
from jobsync_core.worker.routing import Coordination
from jobsync_core.worker.settings import PluginSettings


def pay(account: str) -> None:
    """A task."""


def once(affinity: bool | None = None, key: Any = 'acct:{account}') -> ExactlyOnce:
    made = exactly_once(key=key, affinity=affinity, default_key=lambda: 'm', named_later=True)
    found: ExactlyOnce = vars(made(pay))['exactly_once']
    return found


def settings(**values: Any) -> PluginSettings:
    return PluginSettings(config=CoordinationConfig(), **values)


class TestWhoDecides:
    @pytest.mark.parametrize(
        ('task', 'setting', 'found'),
        [
            (None, True, True),
            (None, False, False),
            (False, True, False),
            (False, False, False),
            (True, True, True),
            (True, False, True),
        ],
    )
    def test_the_task_before_the_settings(
        self, task: bool | None, setting: bool, found: bool
    ) -> None:
        assert has_affinity('pay', once(task), {}, settings(affinity=setting)) is found

    def test_a_task_by_its_message_s_id_as_well(self) -> None:
        assert not has_affinity('pay', once(False, key=None), {}, settings())

    def test_where_all_tasks_are_coordinated_as_well(self) -> None:
        assert not has_affinity('pay', once(False), {}, settings(coordinate='all'))

    @pytest.mark.parametrize('value', [0, 1, 'no', 'False', []])
    def test_what_is_neither_yes_nor_no_is_refused(self, value: Any) -> None:
        with pytest.raises(ConfigurationError, match=r'affinity=.*give True or False'):
            once(value)


PLACES: list[tuple[Mapping[str, object], str]] = [
    ({'jobsync_key': '{account}', 'jobsync_pin': None}, "jobsync_key='{account}'"),
    ({'jobsync_key': None, 'jobsync_pin': ['gpu-%']}, "jobsync_pin=['gpu-%']"),
]


class TestContradictions:
    @pytest.mark.parametrize(('places', 'named'), PLACES)
    def test_of_a_task_s_own_options(self, places: Mapping[str, object], named: str) -> None:
        with pytest.raises(ConfigurationError) as caught:
            check_affinity('pay', once(False), places)
        text = str(caught.value)
        assert text.startswith(f'pay: {named} ') and 'exactly_once(affinity=False)' in text
        assert text.endswith('take out one of the two')

    @pytest.mark.parametrize('affinity', [True, None])
    @pytest.mark.parametrize(('places', 'named'), PLACES)
    def test_there_is_none_with_affinity(
        self, places: Mapping[str, object], named: str, affinity: bool | None
    ) -> None:
        check_affinity('pay', once(affinity), places)

    @pytest.mark.parametrize(('places', 'named'), PLACES)
    def test_with_the_setting(self, places: Mapping[str, object], named: str) -> None:
        off = settings(affinity=False)
        with pytest.raises(ConfigurationError) as caught:
            has_affinity('pay', once(), places, off)
        text = str(caught.value)
        assert text.startswith(f'pay: {named} ') and 'the setting affinity=False' in text
        assert text.endswith('take out it, or say exactly_once(affinity=True)')
        assert has_affinity('pay', once(True), places, off)

    @pytest.mark.parametrize(('places', 'named'), PLACES)
    def test_with_the_setting_where_the_place_is_all_there_is(
        self, places: Mapping[str, object], named: str
    ) -> None:
        with pytest.raises(ConfigurationError, match='take out one of the two'):
            has_affinity('pay', None, places, settings(affinity=False))

    def test_where_every_node_gets_each_message(self) -> None:
        with pytest.raises(ConfigurationError, match=r"on_unclaimed='drop'.*affinity=False"):
            has_affinity('pay', once(False), {}, settings(on_unclaimed='drop'))

    @pytest.mark.parametrize(('affinity', 'setting'), [(False, True), (None, False)])
    def test_with_a_pin_of_the_settings(self, affinity: bool | None, setting: bool) -> None:
        tasks = CoordinatedTasks(
            settings(affinity=setting, pins={'pay': ['gpu-%']}),
            lambda name: Declared(pay, once(affinity), None, None),
            lambda: ['pay'],
        )
        with pytest.raises(ConfigurationError, match=r"^pay: pins\['pay'\]=\('gpu-%',\) says"):
            tasks.pins()


class TestRoute:
    def make(self, key: Any = 'acct:{account}') -> Coordination:
        tasks = CoordinatedTasks(
            settings(), lambda name: Declared(pay, once(False, key), None, None), lambda: ['pay']
        )
        found = tasks.find('pay')
        assert found is not None
        return found

    def test_there_is_none(self) -> None:
        assert self.make().route_of(['a'], {}, 'm1') is None
        assert find_route(self.make(), ['a'], {}, 'm1', Stamps()) is None

    def test_whatever_an_older_sender_stamped(self) -> None:
        """In a home queue, a node's queue or the parked one."""
        assert find_route(self.make(), ['a'], {}, 'm1', Stamps('acct:a', hops=3)) is None

    @pytest.mark.parametrize(
        ('args', 'message_id'), [([], 'm1'), (['a', 'b'], 'm1'), ([''], 'm1'), (5, 'm1')]
    )
    def test_what_makes_no_key_runs_nowhere_all_the_same(
        self, args: Any, message_id: object
    ) -> None:
        found = find_route(self.make('{account}'), args, {}, message_id, Stamps())
        assert isinstance(found, Refused)

    def test_an_id_that_is_the_key_has_to_be_one(self) -> None:
        assert find_route(self.make(None), ['a'], {}, 'm1', Stamps()) is None
        assert isinstance(find_route(self.make(None), ['a'], {}, 'x' * 3000, Stamps()), Refused)

    def test_a_key_that_only_its_sender_could_make_is_left_to_the_task(self) -> None:
        def make(account: str) -> str:
            raise LookupError('no web request here')

        assert isinstance(find_route(self.make(make), ['a'], {}, 'm1', Stamps()), Refused)
        assert find_route(self.make(make), ['a'], {}, 'm1', Stamps('tenant:5')) is None
