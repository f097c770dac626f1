"""Where a message belongs: verdicts, names, pins and routes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from jobsync_core.errors import ConfigurationError, JobSyncError
from jobsync_core.ledger.once import ExactlyOnce, exactly_once
from jobsync_core.worker.routing import (
    HOPS,
    KEY,
    Coordination,
    check_pins,
    home_of_queue,
    is_of_cluster,
    node_queue,
    old_node_queue,
    old_parked_queue,
    parked_queue,
    pin_locks,
    pin_route,
)


def pay(account: str, cents: int = 0) -> None:
    """A task."""


def once(**options: Any) -> ExactlyOnce:
    found: ExactlyOnce = vars(exactly_once(default_key=lambda: 'm', **options)(pay))['exactly_once']
    return found


class TestNames:
    def test_queues_carry_home_cluster_and_node(self) -> None:
        assert node_queue('gpu', 'shop_', 'celery@host-1') == 'gpu.jobsync.shop_.celery@host-1'
        assert parked_queue('gpu', 'shop_') == 'gpu.jobsync.shop_.parked'

    def test_queues_of_the_old_layout_keep_their_names(self) -> None:
        assert old_node_queue('shop_', 'celery@host-1') == 'jobsync.shop_.celery@host-1'
        assert old_parked_queue('shop_') == 'jobsync.shop_.parked'
        assert node_queue('', 'shop_', 'n1') == old_node_queue('shop_', 'n1')
        assert parked_queue('', 'shop_') == old_parked_queue('shop_')

    @pytest.mark.parametrize(
        ('queue', 'home'),
        [
            ('gpu.jobsync.shop_.n1', 'gpu'),
            ('a.b.jobsync.shop_.parked', 'a.b'),
            ('gpu.jobsync.shop_.n1.XQ', 'gpu'),
            ('gpu.jobsync.shop_.n.jobsync.shop_.x', 'gpu'),
            ('jobsync.shop_.n1', ''),
            ('jobsync.shop_.unknown', ''),
            ('jobsync.shop_.n.jobsync.shop_.x', ''),
            ('.jobsync.shop_.n1', None),
            ('gpu.jobsync.other_.n1', None),
            ('gpujobsync.shop_.n1', None),
            ('gpu', None),
            ('', None),
        ],
    )
    def test_the_home_of_a_queue_is_in_its_name(self, queue: str, home: str | None) -> None:
        assert home_of_queue(queue, 'shop_') == home
        assert is_of_cluster(queue, 'shop_') is (home is not None)

    @pytest.mark.parametrize(
        'node',
        [
            'parked',
            'nodes',
            'unrouted',
            'n1.unacked',
            'n1.unacked_index',
            'n1.sources',
            'n1.DQ',
            'n1.XQ',
            'n1.msgs',
            'é' * 120,
        ],
    )
    def test_a_node_is_not_called_what_something_else_at_the_broker_is_called(
        self, node: str
    ) -> None:
        with pytest.raises(ConfigurationError, match=r'node_name.*(another name|shorten)'):
            node_queue('', 'shop_', node)
        with pytest.raises(ConfigurationError, match=r'node_name.*(another name|shorten)'):
            node_queue('gpu', 'shop_', node)

    def test_a_name_that_the_home_queue_makes_too_long_names_both(self) -> None:
        assert node_queue('h' * 223, 'shop_', 'n1')
        with pytest.raises(ConfigurationError, match=r"queue .*hhh.*node_name='n1'.*241 bytes"):
            node_queue('h' * 224, 'shop_', 'n1')

    def test_names_that_are_in_messages_stay(self) -> None:
        """Another version of the plugin has written them."""
        assert (KEY, HOPS) == ('jobsync_key', 'jobsync_hops')


class TestPins:
    def test_a_pin_locks_all_of_its_virtual_keys(self) -> None:
        locks = pin_locks({'b': ['x'], 'a': ['%-gpu', 'n1']}, 3)
        assert locks == [
            *((f'a#{slot}', ('%-gpu', 'n1'), 'pin') for slot in range(3)),
            *((f'b#{slot}', ('x',), 'pin') for slot in range(3)),
        ]

    def test_without_pins_there_are_no_locks(self) -> None:
        assert pin_locks({}, 64) == []

    @pytest.mark.parametrize('slots', [1, 2, 64])
    def test_each_route_is_one_of_the_locked_keys(self, slots: int) -> None:
        locked = {name for name, _, _ in pin_locks({'t': ['x']}, slots)}
        assert {pin_route('t', f'key-{number}', slots) for number in range(500)} == locked

    def test_a_route_stays_the_same(self) -> None:
        """Of another process, another version and another Python."""
        assert pin_route('t', 'a', 64) == 't#47'

    def test_patterns_are_checked(self) -> None:
        assert check_pins({'t': ['a', '%b'], 'u': 'c'}) == {'t': ('a', '%b'), 'u': ('c',)}

    @pytest.mark.parametrize('pins', [None, 'render', ['render'], 5])
    def test_what_is_no_mapping_is_refused(self, pins: object) -> None:
        with pytest.raises(ConfigurationError) as caught:
            check_pins(pins)
        assert repr(pins) in str(caught.value)
        assert 'give a mapping such as' in str(caught.value)

    @pytest.mark.parametrize('patterns', [[], [''], [5], None])
    def test_patterns_that_cannot_work_are_refused(self, patterns: object) -> None:
        with pytest.raises((JobSyncError, TypeError)):
            check_pins({'t': patterns})


class TestCoordination:
    def make(self, **changes: Any) -> Coordination:
        given: dict[str, Any] = {'once': None, 'key': None, 'pin': None, 'slots': 64, **changes}
        return Coordination(
            'shop.pay', pay, given['once'], given['key'], given['pin'], given['slots']
        )

    @pytest.mark.parametrize(
        ('args', 'kwargs'),
        [(('a7',), {}), ((), {'account': 'a7'}), (('a7', 5), {}), (('a7',), {'cents': 3})],
    )
    def test_a_key_is_over_the_arguments_however_they_are_given(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        assert self.make(key='acct-{account}').route_of(args, kwargs, 'm1') == 'acct-a7'

    def test_a_callable_makes_the_key(self) -> None:
        def maker(account: str, cents: int = 0) -> str:
            return f'{account}/{cents}'

        assert self.make(key=maker).route_of(('a', 2), {}, 'm1') == 'a/2'

    def test_the_key_of_exactly_once_is_the_route(self) -> None:
        assert self.make(once=once(key='o-{account}')).route_of(('a',), {}, 'm1') == self.make(
            key='o-{account}'
        ).route_of(('a',), {}, 'm1')

    def test_a_key_for_routing_wins(self) -> None:
        assert (
            self.make(once=once(key='o-{account}'), key='r-{account}').route_of(('a',), {}, 'm1')
            == 'r-a'
        )

    def test_without_a_key_it_is_the_message_s_id(self) -> None:
        assert self.make().route_of(('a',), {}, 'm1') == 'm1'
        assert self.make(once=once()).route_of(('a',), {}, 'm1') == 'm1'

    def test_a_pinned_task_s_route_is_a_virtual_key(self) -> None:
        pinned = self.make(pin=['%gpu'], key='{account}', slots=8)
        assert pinned.pin == ('%gpu',)
        assert pinned.route_of(('a',), {}, 'm1') == pin_route('shop.pay', 'a', 8)
        assert self.make(pin='%gpu').route_of(('a',), {}, 'm1') == pin_route('shop.pay', 'm1', 64)

    def test_arguments_that_the_function_does_not_take_are_a_type_error(self) -> None:
        with pytest.raises(TypeError):
            self.make(key='{account}').route_of((), {}, 'm1')

    @pytest.mark.parametrize('key', ['{acount}', '{', 5, ''])
    def test_a_key_that_cannot_work_is_refused_at_once_and_by_name(self, key: Any) -> None:
        with pytest.raises(ConfigurationError, match=r'shop\.pay|key'):
            self.make(key=key)

    @pytest.mark.parametrize(
        'maker', [lambda account: None, lambda account: [account], lambda account: '']
    )
    def test_a_key_that_is_no_task_id_is_an_error_of_ours(self, maker: Callable[..., Any]) -> None:
        with pytest.raises(JobSyncError):
            self.make(key=maker).route_of(('a',), {}, 'm1')
