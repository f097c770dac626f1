"""The boundary: whatever a message holds, it becomes typed and bounded values, or a reason."""

from __future__ import annotations

from typing import Any

import pytest

from jobsync_core.worker.incoming import (
    MAX_COUNT,
    MAX_NAME,
    MAX_WAITS,
    Refused,
    Stamps,
    find_route,
    read_id,
    read_name,
    read_stamps,
)
from jobsync_core.worker.routing import HOME, HOPS, KEY, WAITS, Coordination, pin_route
from tests.hostile.messages import (
    COUNTS,
    STAMPS,
    TEXTS,
    bad_arguments,
    bad_stamps,
    forged_keys,
    random_stamps,
)


def keyed(n: Any) -> None:
    """A task."""


def of(key: Any = 'k:{n}', pin: Any = None) -> Coordination:
    return Coordination('keyed', keyed, None, key, pin, 64)


class Hostile:
    """Whatever one does with it raises."""

    def __repr__(self) -> str:
        raise ValueError('no')

    __str__ = __repr__
    __format__ = __repr__  # type: ignore[assignment]


class TestStamps:
    def test_what_is_right_is_read(self) -> None:
        assert read_stamps({KEY: 'k:1', HOPS: 3, HOME: 'celery', WAITS: 2, 'other': 1}) == Stamps(
            'k:1', 3, 'celery', 2
        )

    @pytest.mark.parametrize('home', ['x' * 241, 'é' * 121])
    def test_a_queue_s_name_that_no_broker_takes_is_none(self, home: str) -> None:
        assert read_stamps({HOME: home}).home is None and HOME in read_stamps({HOME: home}).wrong
        assert read_stamps({HOME: home[:120]}).home == home[:120]

    @pytest.mark.parametrize(
        'values', [{}, {KEY: None, HOPS: None, HOME: None}, None, [], 'text', 5, b'bytes', [KEY]]
    )
    def test_what_is_not_there_is_absent(self, values: object) -> None:
        assert read_stamps(values) == Stamps()

    @pytest.mark.parametrize('message', bad_stamps(), ids=lambda message: message.name)
    def test_what_cannot_be_right_counts_as_absent_and_is_named_on_one_line(
        self, message: Any
    ) -> None:
        found = read_stamps(message.stamps)
        ((name, value),) = message.stamps.items()
        if type(value) is int and value >= 0 and name in (HOPS, WAITS):
            assert (found.hops == MAX_COUNT or found.waits == MAX_WAITS) and found.wrong == ''
        else:
            assert (found.key, found.hops, found.home, found.waits) == (None, 0, None, 0)
            assert (
                found.wrong.startswith(f'{name}=')
                and found.wrong.isprintable()
                and len(found.wrong) < 200
            )

    @pytest.mark.parametrize(
        'value', [Hostile(), object(), b'k', bytearray(b'k'), {1, 2}, type('S', (str,), {})('k')]
    )
    def test_what_only_a_pickle_can_hold(self, value: object) -> None:
        for name in STAMPS:
            found = read_stamps({name: value})
            assert (found.key, found.hops, found.home, found.waits) == (
                None,
                0,
                None,
                0,
            ) and found.wrong

    def test_whatever_comes_nothing_raises_and_all_is_bounded(self) -> None:
        for message in random_stamps(1, 3000):
            found = read_stamps(message.stamps)
            assert 0 <= found.hops <= MAX_COUNT and 0 <= found.waits <= MAX_WAITS
            assert found.key is None or (
                isinstance(found.key, str) and 0 < len(found.key.encode()) <= 2000
            )
            assert found.home is None or 0 < len(found.home) <= MAX_NAME
            assert found.wrong.isprintable() and len(found.wrong) < 800


class TestNames:
    @pytest.mark.parametrize('name', ['proj.task', 'a' * MAX_NAME, 'with space', 'ümlaut'])
    def test_a_name(self, name: str) -> None:
        assert read_name(name, 'task') == name

    @pytest.mark.parametrize('name', [*TEXTS[:-5], 'a' * (MAX_NAME + 1), None, b'task', Hostile()])
    def test_what_is_none_is_refused_on_one_line(self, name: object) -> None:
        found = read_name(name, 'task')
        assert isinstance(found, Refused) and found.reason.isprintable() and len(found.reason) < 200

    def test_an_id(self) -> None:
        assert read_id('a1') == 'a1'

    @pytest.mark.parametrize('value', [*TEXTS, None, 5, b'x', Hostile()])
    def test_what_is_no_id(self, value: object) -> None:
        found = read_id(value)
        assert isinstance(found, Refused) and found.reason.isprintable()


class TestRoutes:
    @pytest.mark.parametrize(
        'message', forged_keys() + bad_stamps(), ids=lambda message: message.name
    )
    def test_the_route_is_made_from_the_arguments(self, message: Any) -> None:
        assert find_route(of(), [7], {}, 'm1', read_stamps(message.stamps)) == 'k:7'
        assert find_route(of(pin='gpu'), (7,), {}, 'm1', read_stamps(message.stamps)) == pin_route(
            'keyed', 'k:7', 64
        )

    @pytest.mark.parametrize('message', bad_arguments(), ids=lambda message: message.name)
    def test_arguments_without_a_key_are_refused_with_the_reason(self, message: Any) -> None:
        found = find_route(of(), message.args, message.kwargs, 'm1', Stamps())
        assert isinstance(found, Refused) and found.reason.isprintable()

    @pytest.mark.parametrize(
        ('args', 'kwargs'),
        [
            (None, {}),
            (5, {}),
            ('ab', {}),
            ({}, {}),
            ([7], None),
            ([7], []),
            ([7], 5),
            ([7], {1: 2}),
            ([Hostile()], {}),
            ([object()], {}),
        ],
    )
    def test_what_are_no_arguments_is_refused(self, args: object, kwargs: object) -> None:
        assert isinstance(find_route(of(), args, kwargs, 'm1', Stamps()), Refused)

    @pytest.mark.parametrize(
        'error', [KeyError('x'), OSError('network'), RecursionError(), Hostile]
    )
    def test_a_callable_that_raises(self, error: Any) -> None:
        def make(n: int) -> str:
            raise (
                error
                if isinstance(error, Exception)
                else type('Odd', (Exception,), {'__str__': error.__repr__})()
            )

        found = find_route(of(make), [7], {}, 'm1', Stamps())
        assert isinstance(found, Refused) and found.reason.isprintable()

    @pytest.mark.parametrize('key', ['', None, 5, 'x' * 2001, '\0', '\ud800'])
    def test_a_callable_that_makes_no_key(self, key: Any) -> None:
        assert isinstance(find_route(of(lambda n: key), [7], {}, 'm1', Stamps()), Refused)

    def test_a_key_that_only_its_sender_could_make_is_taken_from_the_stamp(self) -> None:
        def make(n: int) -> str:
            raise LookupError('no web request here')

        assert find_route(of(make), [7], {}, 'm1', Stamps('tenant:5')) == 'tenant:5'

    @pytest.mark.parametrize(
        'key',
        [
            'other#3',
            'tenant:5',
            'keyed#64',
            'keyed#-1',
            'keyed#03',
            'keyed#²',
            'keyed#',
            'keyed',
            'keyed#9999999999999',
        ],
    )
    def test_but_never_around_a_pin(self, key: str) -> None:
        def make(n: int) -> str:
            raise LookupError('no web request here')

        assert isinstance(find_route(of(make, 'gpu'), [7], {}, 'm1', Stamps(key)), Refused)
        assert find_route(of(make, 'gpu'), [7], {}, 'm1', Stamps('keyed#63')) == 'keyed#63'

    @pytest.mark.parametrize('message_id', [None, [], '\0', 'x' * 3000])
    def test_an_id_that_is_the_key_and_cannot_be(self, message_id: object) -> None:
        by_id = Coordination('keyed', keyed, None, None, 'gpu', 64)
        assert isinstance(find_route(by_id, [7], {}, message_id, Stamps()), Refused)


def test_no_value_of_the_suite_is_both_right_and_wrong() -> None:
    assert len(TEXTS) + len(COUNTS) > 35
    assert len({message.name for message in bad_stamps() + forged_keys() + bad_arguments()}) > 90


def test_entries_of_a_list_that_are_no_messages_are_told_apart_without_an_error() -> None:
    from jobsync_celery.incoming import read_raw
    from tests.hostile.celery_messages import ENTRIES

    found = [read_raw(entry) for entry in ENTRIES]
    assert sum(isinstance(item, Refused) for item in found) == 15
    assert all(
        item.reason.isprintable()
        if isinstance(item, Refused)
        else item['properties']['delivery_info']
        for item in found
    )
