"""Whether a worker consumes, and the drain of one that does not."""

from __future__ import annotations

from typing import Any

import pytest

from jobsync_core.worker import consuming as module
from jobsync_core.worker.consuming import Consuming, SelfDrain
from tests.support.fakes import Clock
from tests.support.waiting import eventually


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(module, 'clock', made)
    return made


class Node:
    node_name = 'n1'

    def __init__(self) -> None:
        self.log: list[str] = []
        self.healthy, self.state, self.other = True, 'active', 'active'
        self.silent, self.other_silent = False, False
        self.groups: list[str] = []
        self.other_groups: list[str] = []

    def am_i_healthy(self) -> bool:
        return self.healthy

    def local_status(self) -> dict[str, Any]:
        return {'state': self.state}

    def get_active_nodes(self) -> list[dict[str, Any]]:
        return [
            {'name': 'n1', 'state': self.state, 'silent': self.silent, 'groups': self.groups},
            {
                'name': 'n2',
                'state': self.other,
                'silent': self.other_silent,
                'groups': self.other_groups,
            },
        ]

    def tell(self, silent: bool) -> None:
        self.log.append('silent' if silent else 'not silent')
        self.silent = silent

    def stand_aside(self, aside: bool = True) -> None:
        self.log.append('drain' if aside else 'undrain')
        self.state = 'draining' if aside else 'active'


class TestConsuming:
    def test_not_before_the_first_look(self, clock: Clock) -> None:
        assert Consuming(5).problem() == 'not yet'

    def test_while_each_queue_is_looked_at(self, clock: Clock) -> None:
        consuming = Consuming(5)
        consuming.looked('a')
        consuming.looked('b')
        assert consuming.problem() == ''
        clock.time += 4
        consuming.looked('a')
        clock.time += 2
        assert consuming.problem() == 'b: for 6 s nobody has looked'
        assert (consuming.silence('b'), consuming.silence('a'), consuming.silence()) == (6, 2, 2)

    def test_not_from_the_moment_at_which_the_broker_is_lost(self, clock: Clock) -> None:
        consuming = Consuming(5)
        consuming.looked('a')
        consuming.lost('a', ConnectionError('gone'))
        assert consuming.problem() == 'a: gone'
        consuming.looked('a')
        assert consuming.problem() == ''

    def test_not_while_it_stops(self, clock: Clock) -> None:
        consuming = Consuming(5)
        consuming.looked('a')
        consuming.stopped = True
        assert consuming.problem() == 'stopped'

    def test_a_rest_is_no_silence(self, clock: Clock) -> None:
        consuming = Consuming(5)
        consuming.looked('a')
        clock.time += 100
        consuming.rests('a')
        assert consuming.silence('a') == 0

    def test_all_queues_together_are_told_once_and_once_a_minute(
        self, clock: Clock, caplog: pytest.LogCaptureFixture
    ) -> None:
        consuming = Consuming(5)
        with caplog.at_level('INFO'):
            for _ in range(125):
                clock.time += 1
                for queue in 'abc':
                    consuming.lost(queue, 'refused')
            assert len(caplog.records) == 3, [record.getMessage() for record in caplog.records]
            for queue in 'abc':
                consuming.looked(queue)
        assert 'answers again, after 124 s' in caplog.records[-1].getMessage()
        assert len(caplog.records) == 4


class TestSelfDrain:
    @pytest.fixture
    def node(self) -> Node:
        return Node()

    def drain(self, node: Any, silence: list[float]) -> SelfDrain:
        return SelfDrain(node, lambda: silence[0], 10)

    def test_a_node_that_is_silent_for_the_timeout_drains_until_it_is_not(self, node: Node) -> None:
        silence = [9.0]
        made = self.drain(node, silence)
        for value in (5.0, 11.0, 50.0, 0.1, 0.2):
            silence[0] = value
            made.look()
        assert node.log == ['drain', 'undrain']

    def test_it_says_so_before_and_says_when_it_is_over(self, node: Node) -> None:
        silence = [3.0]
        made = SelfDrain(node, lambda: silence[0], 10, node.tell)  # type: ignore[arg-type]
        for value in (3.0, 5.0, 7.0, 3.0):
            silence[0] = value
            made.look()
        assert node.log == ['silent', 'not silent']
        silence[0] = 5.0
        made.look()
        node.silent = False  # it was evicted, and has another row
        made.look()
        assert node.log[2:] == ['silent', 'silent']

    def test_it_says_that_it_is_over_though_no_answer_came_when_it_said_so(
        self, node: Node
    ) -> None:
        silence = [5.0]

        def tell(silent: bool) -> None:
            node.tell(silent)
            if silent:
                raise ConnectionError('the answer is lost')

        made = SelfDrain(node, lambda: silence[0], 10, tell)  # type: ignore[arg-type]
        with pytest.raises(ConnectionError):
            made.look()
        made.look()
        silence[0] = 0.0
        made.look()
        assert node.log == ['silent', 'not silent'] and not node.silent

    def test_it_takes_keys_again_though_the_database_has_no_connection_left_to_say_so_by(
        self, node: Node
    ) -> None:
        silence, refuses = [5.0], [False]

        def tell(silent: bool) -> None:
            if refuses[0]:
                raise ConnectionError('too many clients already')
            node.tell(silent)

        made = SelfDrain(node, lambda: silence[0], 10, tell)  # type: ignore[arg-type]
        for value in (5.0, 11.0):
            silence[0] = value
            made.look()
        silence[0], refuses[0] = 0.0, True
        with pytest.raises(ConnectionError):
            made.look()
        refuses[0] = False
        made.look()
        assert node.log == ['silent', 'drain', 'undrain', 'not silent']

    def test_where_all_are_silent_each_keeps_its_keys_and_the_first_that_is_not_moves_none(
        self, node: Node
    ) -> None:
        """The broker itself is away; when it is back, some are connected before others."""
        silence = [5.0]
        made = SelfDrain(node, lambda: silence[0], 10, node.tell)  # type: ignore[arg-type]
        made.look()
        node.other_silent = True
        for value in (7.0, 11.0, 50.0):
            silence[0] = value
            made.look()
        node.other_silent = False
        for value in (51.0, 54.0):
            silence[0] = value
            made.look()
        assert node.log == ['silent']
        silence[0] = 55.5  # by now it is this node alone
        made.look()
        assert node.log == ['silent', 'drain']

    def test_a_node_without_a_lease_has_nothing_to_give(self, node: Node) -> None:
        node.healthy = False
        self.drain(node, [99.0]).look()
        assert node.log == []

    def test_whatever_a_look_raises_the_thread_goes_on(
        self, node: Node, caplog: pytest.LogCaptureFixture
    ) -> None:
        asked: list[int] = []

        def silence() -> float:
            asked.append(1)
            raise RuntimeError("can't start new thread")

        made = SelfDrain(node, silence, 0.05)  # type: ignore[arg-type]  # of a Job
        made.start()
        eventually(lambda: len(asked) > 3)
        made.stop()
        assert caplog.text.count("can't start new thread") == 1

    def test_what_an_operator_drained_stays_drained(self, node: Node) -> None:
        node.state, silence = 'draining', [99.0]
        made = self.drain(node, silence)
        made.look()
        silence[0] = 0.0
        made.look()
        assert node.log == []

    def test_the_last_one_keeps_its_keys(self, node: Node) -> None:
        node.other = 'draining'
        silence = [99.0]
        made = self.drain(node, silence)
        made.look()
        assert (node.log, made.drained) == ([], False)
        node.other = 'active'
        made.look()
        silence[0] = 104.0
        made.look()
        assert node.log == ['drain']

    def test_the_last_one_of_its_queue_groups_keeps_its_keys(self, node: Node) -> None:
        node.groups, node.other_groups = ['mail', 'slow'], ['fast']
        silence = [99.0]
        made = self.drain(node, silence)
        made.look()
        silence[0] = 120.0
        made.look()
        assert node.log == []
        node.other_groups = ['fast', 'mail']
        made.look()
        silence[0] = 125.0
        made.look()
        assert node.log == ['drain']
        node.other_groups = ['fast']  # which takes over none of its keys
        for _ in range(4):
            made.look()
        assert node.log == ['drain', 'undrain']

    @pytest.mark.parametrize('by_operator', [None, 'n1', 'n3'])
    def test_of_those_that_drain_at_one_moment_one_takes_its_keys_back(
        self, by_operator: str | None
    ) -> None:
        """The broker is away: each has found others that were active."""
        states = dict.fromkeys(('n1', 'n2', 'n3', 'n4'), 'active')
        before = dict(states)
        nodes = [Seeing(name, states) for name in states]
        drains = [SelfDrain(node, lambda: silence[0], 10) for node in nodes]  # type: ignore[arg-type]
        silence = [99.0]
        for node in nodes:
            node.seen = before  # all look before one of them drains
        for drain in drains:
            drain.look()
        silence[0] += 5
        if by_operator is not None:
            states[by_operator] = 'draining'
        for drain in drains:
            drain.look()
        assert [*states.values()] == ['draining'] * 4
        for node in nodes:
            node.seen = states
        for _ in range(10):
            for drain in drains:
                drain.look()
            assert [*states.values()].count('active') <= 1
        kept = 'n1' if by_operator != 'n1' else 'n2'
        assert [name for name, state in states.items() if state == 'active'] == [kept]
        silence[0] = 0.0
        for drain in drains:
            drain.look()
        expected = dict.fromkeys(states, 'active')
        assert states == {**expected, **({by_operator: 'draining'} if by_operator else {})}


class Seeing(Node):
    """A node of several.

    Args:
        name: Its name.
        states: What each of them is, as the database has it.
    """

    def __init__(self, name: str, states: dict[str, str]) -> None:
        super().__init__()
        self.node_name = name
        self.states = self.seen = states

    def local_status(self) -> dict[str, Any]:
        return {'state': self.states[self.node_name]}

    def get_active_nodes(self) -> list[dict[str, Any]]:
        return [{'name': name, 'state': state} for name, state in self.seen.items()]

    def stand_aside(self, aside: bool = True) -> None:
        self.states[self.node_name] = 'draining' if aside else 'active'
