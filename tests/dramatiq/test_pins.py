"""Pins of actors come and go with the code."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from jobsync_core import CoordinationConfig
from tests.support.brokers import BrokerServer
from tests.support.cluster import query
from tests.support.waiting import eventually

from ..celery.programs import Programs

APP = """
import os

import dramatiq
from dramatiq.brokers.redis import RedisBroker
from jobsync_dramatiq import JobSync

broker = RedisBroker(url=os.environ['CELERY_BROKER_URL'])
pins = {'rendr': ['gpu-%'], 'draw': ['%'], 'of-another-module': ['%']}
broker.add_middleware(JobSync(pin_slots=4, pins=pins))
dramatiq.set_broker(broker)


@dramatiq.actor(jobsync_pin=['gpu-%'] if 'PINNED' in os.environ else None)
def render():
    pass


@dramatiq.actor(jobsync_pin=['%'])
def draw():
    pass
"""


def test_a_pin_that_is_taken_out_of_the_code_goes_with_the_next_worker(
    config: CoordinationConfig, redis_server: BrokerServer, tmp_path: Path
) -> None:
    def pinned() -> list[str]:
        return [
            name
            for (name,) in query(
                config, "SELECT DISTINCT split_part(task_id, '#', 1) FROM {}lock ORDER BY 1"
            )
        ]

    place = tmp_path / 'project'
    place.mkdir()
    (place / 'app.py').write_text(APP, encoding='utf-8')
    with closing(Programs(config, redis_server, place, tmp_path)) as programs:
        first = programs.start('PINNED=1 dramatiq app -p 1 -t 1', 'ready for action.')
        assert pinned() == ['draw', 'of-another-module', 'render', 'rendr']
        assert first.log.count("pins: 'rendr' is not known here; did you mean 'render'?") == 1
        assert first.log.count("pins: 'of-another-module' is not known here\n") == 1
        assert first.log.count('is not known here') == 2
        programs.start('dramatiq app -p 1 -t 1', 'ready for action.')
        eventually(lambda: pinned() == ['draw', 'of-another-module', 'rendr'])
