"""The simulation: every task is counted once, and only what must move moves."""

from __future__ import annotations

from typing import Any

import pytest

from jobsync_core.assignment.groups import GROUP_SPAN
from jobsync_core.assignment.hashing import task_to_token
from jobsync_core.assignment.model import Segment
from jobsync_core.assignment.simulate import Move, holder, moves, simulate
from jobsync_core.errors import ConfigurationError


class TestSimulate:
    @pytest.mark.parametrize(
        ('nodes', 'tasks', 'tokens'),
        [(7, 600, 10_000), (1, 10, 100), (3, 0, 10), (5, 1_000, 7), (4, 50, 2)],
    )
    def test_tokens_and_tasks_are_all_there_before_and_after_each_change(
        self, nodes: int, tasks: int, tokens: int
    ) -> None:
        found = simulate(nodes, tasks, tokens)
        after = [(found.shares, nodes), (found.joined.shares, nodes + 1)]
        if found.left is not None:
            after.append((found.left.shares, nodes - 1))
        for shares, size in after:
            assert len(shares) == size
            assert sum(share.tokens for share in shares) == tokens
            assert sum(share.tasks for share in shares) == tasks
            assert (
                max(share.tokens for share in shares) - min(share.tokens for share in shares) <= 1
            )

    def test_tasks_are_where_the_hash_function_puts_them(self) -> None:
        found = simulate(2, 500, 1_000, 'md5')
        assert found.shares[0].tasks == sum(
            task_to_token(task, 1_000, 'md5') < 500 for task in range(500)
        )

    def test_a_joining_node_takes_its_share_and_nothing_else_moves(self) -> None:
        found = simulate(4, 1_000, 10_000)
        joiner = found.joined.shares[-1]
        assert joiner.node == found.joined.node
        assert found.joined.tokens_moved == joiner.tokens == 2_000
        assert found.joined.tasks_moved == joiner.tasks

    def test_only_what_a_leaving_node_had_moves(self) -> None:
        found = simulate(4, 1_000, 10_000)
        assert found.left is not None
        leaver = found.shares[-1]
        assert (found.left.node, found.left.tokens_moved, found.left.tasks_moved) == (
            leaver.node,
            leaver.tokens,
            leaver.tasks,
        )

    def test_weights_scale_the_shares(self) -> None:
        found = simulate(2, 0, 900, weights={'node-1': 2.0})
        assert [share.tokens for share in found.shares] == [600, 300]

    def test_a_single_node_has_nobody_to_leave_its_tokens_to(self) -> None:
        assert simulate(1, 10, 10).left is None

    @pytest.mark.parametrize(
        'wrong',
        [
            {'nodes': 0},
            {'tasks': -1},
            {'total_tokens': 0},
            {'total_tokens': 1_000_001},
            {'nodes': True},
        ],
    )
    def test_numbers_out_of_range_are_named(self, wrong: dict[str, Any]) -> None:
        sizes: dict[str, Any] = {'nodes': 2, 'tasks': 10, 'total_tokens': 10}
        with pytest.raises(ConfigurationError, match=next(iter(wrong))):
            simulate(**{**sizes, **wrong})

    def test_an_unknown_hash_function_is_named(self) -> None:
        with pytest.raises(ConfigurationError, match='crc32'):
            simulate(2, 10, 10, 'crc32')


class TestMoves:
    def test_ranges_are_compared_token_by_token_and_summed_by_pair(self) -> None:
        before = [Segment(0, 50, 'a'), Segment(50, 100, 'b')]
        after = [
            Segment(0, 10, 'a'),
            Segment(10, 20, 'c'),
            Segment(20, 40, 'a'),
            Segment(40, 60, 'c'),
            Segment(60, 100, 'b'),
        ]
        assert moves(before, after) == [Move('a', 'c', 20), Move('b', 'c', 10)]

    def test_the_order_of_rows_is_of_no_matter(self) -> None:
        before = [Segment(50, 100, 'b'), Segment(0, 50, 'a')]
        assert moves(before, before[::-1]) == []

    def test_what_goes_to_nobody_is_shown(self) -> None:
        assert moves([Segment(0, 5, 'a')], [Segment(0, 5, None, blocked=True)]) == [
            Move('a', None, 5)
        ]

    def test_tokens_under_way_belong_to_their_receiver(self) -> None:
        assert holder(Segment(0, 5, 'a', moving=True, moving_to='b')) == 'b'
        assert holder(Segment(0, 5, 'a', moving=True, blocked=True)) is None
        assert holder(Segment(0, 5, 'a')) == 'a'
        assert moves([Segment(0, 5, 'a', moving=True, moving_to='b')], [Segment(0, 5, 'b')]) == []

    def test_tokens_without_a_row_are_nobodys(self) -> None:
        before = [Segment(0, 10, 'a')]
        after = [Segment(0, 10, 'a'), Segment(GROUP_SPAN, GROUP_SPAN + 10, 'b')]
        assert moves(before, after) == [Move(None, 'b', 10)]
        assert moves(after, before) == [Move('b', None, 10)]
