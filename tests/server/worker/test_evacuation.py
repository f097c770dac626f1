"""Evacuation beside nodes that come and go, on a real database and with a broker in memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from jobsync_core import CoordinationConfig, Job
from jobsync_core.worker.evacuation import Evacuable, evacuate
from tests.server.worker.test_duties import World
from tests.support.cluster import query
from tests.support.fake_broker import FakeBroker

__all__ = ['world']


class EvacuatingBroker(FakeBroker):
    """A connection for an evacuation."""

    kind = 'celery'

    def places(self) -> list[str]:
        return []

    def close(self) -> None:
        pass


@pytest.fixture
def world(config: CoordinationConfig) -> Iterator[World]:
    with Job('early', config, wait_on_enter=0):
        pass  # it has made the tables
    with ExitStack() as stack:
        yield World(config, stack)


@pytest.mark.parametrize('known', [False, True], ids=['new', 'back'])
def test_a_node_that_comes_while_others_are_evacuated_keeps_its_messages(
    world: World, known: bool
) -> None:
    world.queue('n1')
    world.queue('n2')
    if known:
        kill(world, 'n2')
    world.contents.put('q.n1', 'a')
    world.contents.put('q.n2', 'b')
    broker = EvacuatingBroker(world.contents, False)
    broker.on_restore = lambda node: node == 'n1' and world.node('n2', start=False)
    evacuable: Evacuable = broker
    done = evacuate(evacuable, world.config)
    assert (done.busy, done.moved, broker.restored) == (['n2'], {'home': 1}, ['n1'])
    assert world.contents.routes('q.n2') == ['b']


def test_a_killed_node_is_evacuated_although_its_row_is_there(world: World) -> None:
    world.queue('n1')
    kill(world, 'n1')
    world.contents.put('q.n1', 'a')
    done = evacuate(EvacuatingBroker(world.contents, False), world.config)
    assert (done.busy, done.moved) == ([], {'home': 1})


def kill(world: World, node: str) -> None:
    """Leave the row of a node that was killed, and whose cluster has nobody left who removes it."""
    query(
        world.config,
        """INSERT INTO "{}node" (name, incarnation, state, lease_sec) VALUES (%s,
            gen_random_uuid()::text, 'active', 1)""",
        (node,),
    )
