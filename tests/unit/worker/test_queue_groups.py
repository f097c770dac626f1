"""Queue groups by the settings: which queues share a ring, and who may consume them."""

from __future__ import annotations

from typing import Any

import pytest

from jobsync_core.config import CoordinationConfig
from jobsync_core.errors import ConfigurationError
from jobsync_core.store.queues import Division
from jobsync_core.worker.queue_groups import (
    check_queue_groups,
    disagreements,
    divided,
    group_of,
    whole_groups,
)
from jobsync_core.worker.settings import PluginSettings

GROUPS = {'fast': ('high', 'low'), 'odd': ('one',)}


def test_a_queue_is_a_group_of_its_own_unless_a_setting_names_it() -> None:
    settings = PluginSettings(config=CoordinationConfig(), queue_groups={'fast': ['high', 'low']})
    assert [settings.group_of(home) for home in ('high', 'low', 'mail', '')] == [
        'fast',
        'fast',
        'mail',
        '',
    ]
    assert group_of({}, 'mail') == 'mail'


@pytest.mark.parametrize(
    ('value', 'says'),
    [
        ([('fast', ['high'])], 'give a mapping'),
        ({'': ['high']}, "'' is no name"),
        ({'fast': 'high'}, "'high' in place of a list"),
        ({'fast': []}, 'in place of a list'),
        ({'fast': ['high', '']}, "'' in 'fast' is no queue"),
        ({'fast': ['high', 'a\0b']}, 'queue_groups: queue group .*: give the name of a queue'),
        ({'x' * 256: ['high']}, 'queue_groups: queue group .*: give the name of a queue'),
        ({'fast': ['\ud800']}, 'queue_groups: queue group .*: give the name of a queue'),
        ({'fast': ['high'], 'slow': ['low', 'high']}, "'high' is in 'fast' and in 'slow'"),
        ({'fast': ['high', 'high']}, "'high' is in 'fast' and in 'fast'"),
        ({'fast': ['slow'], 'slow': ['low']}, "'slow' is the name of a group and of a queue"),
    ],
)
def test_what_cannot_be_groups_is_named_with_the_remedy(value: Any, says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        check_queue_groups(value)


def test_a_group_may_be_named_after_a_queue_of_its_own() -> None:
    assert check_queue_groups({'high': ['high', 'low']}) == {'high': ('high', 'low')}


@pytest.mark.parametrize(
    ('homes', 'says'),
    [
        (['high', 'low', 'mail'], ''),
        (['mail'], ''),
        ([], ''),
        (['high', 'mail'], "worker consumes 'high' and not 'low': let it consume all"),
        (['fast', 'high', 'low'], "'fast' is a group of 'high', 'low'"),
        (['fast'], "worker consumes 'fast' and not 'high', 'low'"),
    ],
)
def test_a_worker_that_consumes_a_part_of_a_group_is_told(homes: list[str], says: str) -> None:
    found = divided(GROUPS, homes)
    assert says in found and bool(says) == bool(found)


def test_a_worker_belongs_to_the_groups_of_which_it_consumes_all() -> None:
    assert whole_groups(GROUPS, ['low', 'high', 'one', 'mail']) == ('fast', 'mail', 'odd')
    assert whole_groups(GROUPS, ['low', 'mail']) == ('mail',)
    assert whole_groups({}, ['', 'mail']) == ('', 'mail')


def test_of_many_nodes_that_group_a_queue_in_different_ways_some_are_named() -> None:
    nodes = [f'n{number}' for number in range(9)]
    found = [Division('high', 'fast', nodes), Division('high', 'high', ['m'])]
    (told,) = disagreements([*found])
    assert "'fast' for n0, n1, n2 and 6 more and 'high' for m" in told
    assert disagreements([]) == []
