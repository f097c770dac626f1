"""What the plugin uses of Dramatiq, pika and redis-py that is not promised to stay."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import dramatiq.brokers.redis as dramatiq_redis
import pytest
from dramatiq.broker import Broker
from dramatiq.brokers.rabbitmq import RabbitmqBroker
from dramatiq.brokers.redis import RedisBroker

from jobsync_core.config import CoordinationConfig
from jobsync_core.errors import ConfigurationError
from jobsync_core.worker.parts import Part, missing
from jobsync_dramatiq.broker.opening import open_broker
from jobsync_dramatiq.broker.redis_keys import RedisKeys
from jobsync_dramatiq.node import check_parts
from jobsync_dramatiq.parts import PARTS, REDIS
from tests.support.private_parts import foreign_names, names_in

_PAGE = Path(__file__).parents[2] / 'docs' / 'DRAMATIQ.md'
_CONFIG = CoordinationConfig(appname='shop_')


@pytest.mark.parametrize('part', PARTS, ids=lambda part: f'{part.owner}-{part.use}')
def test_the_installed_versions_have_it(part: Part) -> None:
    assert missing([part]) == []


def test_the_page_has_the_same_table() -> None:
    rows = re.findall(
        r'^\| ([^|]+) \| `([\w.:]+)` \| ((?:`\w+`(?:, )?)+) \|$',
        _PAGE.read_text(encoding='utf-8'),
        re.MULTILINE,
    )
    assert [
        (use, owner, tuple(re.findall(r'`(\w+)`', names))) for use, owner, names in rows
    ] == list(map(tuple, PARTS))


def test_whatever_private_part_is_used_is_listed() -> None:
    listed = {name for part in PARTS for name in part.names}
    used = foreign_names('jobsync_dramatiq')
    assert {name: where for name, where in used.items() if name not in listed} == {}


def test_whatever_is_listed_is_used() -> None:
    listed = {name for part in PARTS for name in part.names}
    # It makes `do_fetch` and the like.
    assert listed - names_in('jobsync_dramatiq') == {'__getattr__'}


def test_without_a_part_the_worker_does_not_start_and_names_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    redis = open_broker(RedisBroker(url='redis://127.0.0.1:1/0'), _CONFIG)
    rabbit = open_broker(RabbitmqBroker(host='127.0.0.1', port=1), _CONFIG)
    check_parts(redis)
    monkeypatch.delattr(RedisBroker, '__getattr__')
    assert missing(PARTS, (REDIS,)) == ['dramatiq.brokers.redis:RedisBroker.__getattr__']
    with pytest.raises(ConfigurationError, match=r'lacks dramatiq.*RedisBroker\.__getattr__'):
        check_parts(redis)
    check_parts(rabbit)


def test_what_an_instance_gets_is_found_and_what_it_does_not_get_is_missed() -> None:
    owner = 'dramatiq.brokers.redis:RedisBroker'
    assert missing([Part('x', owner, ('broker_id', 'broker_ids'))]) == [f'{owner}.broker_ids']
    nothing = Part('x', 'dramatiq.brokers.nothing:Broker', ('a', 'b'))
    assert missing([nothing]) == [
        'dramatiq.brokers.nothing:Broker.a',
        'dramatiq.brokers.nothing:Broker.b',
    ]


def test_dramatiq_s_script_has_our_commands_and_our_names_of_keys() -> None:
    script = (Path(dramatiq_redis.__file__).parent / 'redis' / 'dispatch.lua').read_text('utf-8')
    for command in ('enqueue', 'fetch', 'ack', 'nack', 'requeue'):
        assert f'command == "{command}"' in script, command
    described = re.findall(r'^-- (\$namespace:\S+)$', script, re.MULTILINE)
    keys = RedisKeys('$namespace', 'shop_')
    ours = {
        keys.taken('$worker_id', '$queue_name'),
        keys.signs,
        *(keys.queue(f'$queue_name{ending}') for ending in ('', '.msgs', '.XQ', '.XQ.msgs')),
    }
    assert ours == set(described)


def test_what_an_instance_gets_is_found_behind_what_stands_in_its_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = Broker.__init__

    def patched(self: Any, *args: Any, **options: Any) -> None:  # as Sentry's: it wraps nothing
        original(self, *args, **options)

    monkeypatch.setattr(Broker, '__init__', patched)
    check_parts(open_broker(RedisBroker(url='redis://127.0.0.1:1/0'), _CONFIG))
    owner = 'dramatiq.broker:Broker'
    assert missing([Part('x', owner, ('actors', 'actresses'))]) == [f'{owner}.actresses']
