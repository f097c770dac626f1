"""A Task is its id."""

from __future__ import annotations

import copy
import pickle

import pytest

from jobsync_core.task import Task, task_id_of


def test_tasks_of_one_id_are_one_task_whatever_their_names() -> None:
    assert Task(1, 'one') == Task(1) and hash(Task(1, 'one')) == hash(Task(1))
    assert Task(1) != Task('1') and Task(1) != 1
    assert len({Task('a'), Task('a', 'b'), Task('c')}) == 2


def test_a_task_carries_its_id_and_name_and_nothing_else() -> None:
    task = Task('a', name='first')
    assert (task.id, task.name) == ('a', 'first') and Task('a').name is None
    with pytest.raises(AttributeError):
        task.other = 1  # type: ignore[attr-defined]


def test_the_id_of_a_task_of_a_look_alike_and_of_a_plain_value() -> None:
    class Order:
        id = 7

    assert [task_id_of(value) for value in (Task('a'), Order(), 'a', 5, ('x', 1))] == [
        'a',
        7,
        'a',
        5,
        ('x', 1),
    ]


def test_copies_are_equal_and_the_text_shows_what_was_given() -> None:
    task = Task(('a', 1), 'pair')
    assert pickle.loads(pickle.dumps(task)) == copy.deepcopy(task) == task
    assert repr(task) == "Task(('a', 1), name='pair')" and repr(Task(5)) == 'Task(5)'
