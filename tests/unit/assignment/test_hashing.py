"""The mapping from task ids to tokens is stored in databases: it must never change."""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import uuid

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobsync_core.assignment.hashing import HASH_FUNCTIONS, check_task_id, task_key, task_to_token
from jobsync_core.errors import ConfigurationError, InvalidTaskId, JobSyncError

quick = settings(deadline=None, max_examples=200)
ids = st.one_of(
    st.integers(),
    st.text(st.characters(exclude_characters='\0', codec='utf-8'), max_size=200),
    st.uuids(),
    st.booleans(),
    st.tuples(st.integers(), st.text('abc')),
)


@pytest.mark.parametrize(
    ('name', 'tokens'),
    [
        ('md5', [693, 8519, 5638]),
        ('sha256', [5083, 8562, 9876]),
        ('double_sha256', [3058, 9638, 1716]),
    ],
)
def test_known_ids_keep_the_tokens_that_md5sum_and_sha256sum_gave_them(
    name: str, tokens: list[int]
) -> None:
    assert [task_to_token(task_id, 10_000, name) for task_id in (5, 'customer-X', 'x')] == tokens


@quick
@given(ids, st.integers(1, 1_000_000))
def test_each_function_reads_its_digest_as_documented(task_id: object, total: int) -> None:
    data = str(task_id).encode()
    assert task_to_token(task_id, total, 'md5') == int(hashlib.md5(data).hexdigest(), 16) % total
    assert (
        task_to_token(task_id, total, 'sha256')
        == int(hashlib.sha256(data).hexdigest()[:16], 16) % total
    )
    twice = hashlib.sha256(hashlib.sha256(data).digest()).hexdigest()
    assert task_to_token(task_id, total) == int(twice[:16], 16) % total


@quick
@given(ids)
def test_the_text_of_an_id_is_what_str_gives(task_id: object) -> None:
    text = check_task_id(task_id)
    assert text == str(task_id) and type(text) is str
    assert check_task_id(text) == text


@quick
@given(ids)
def test_a_key_fits_a_bigint_and_follows_from_the_text(task_id: object) -> None:
    assert -(2**63) <= task_key(str(task_id)) < 2**63
    assert (
        task_key(str(task_id)) == task_key(check_task_id(task_id)) != task_key(str(task_id) + ' ')
    )


def test_a_subclass_of_str_is_reduced_to_its_text() -> None:
    class Kind(str, enum.Enum):
        A = 'a'

    assert check_task_id(Kind.A) == str(Kind.A) and type(check_task_id(Kind.A)) is str


class Anonymous:
    pass


@dataclasses.dataclass(frozen=True)
class Part:
    of: object


class Broken:
    def __str__(self) -> str:
        raise RuntimeError('no text')


@pytest.mark.parametrize(
    ('task_id', 'part'),
    [
        (None, 'None'),
        ([1], 'list is not hashable'),
        (([1],), 'tuple is not hashable'),
        ('a\0b', 'NUL'),
        ('\ud800', 'surrogates'),
        ('x' * 2001, '2001 bytes'),
        ('é' * 1001, '2002 bytes'),
        pytest.param(10**5000, 'int has no text', id='huge'),
        (Anonymous(), 'differs between processes'),
        (frozenset('ab'), 'differs between processes'),
        ((1, frozenset('ab')), 'differs between processes'),
        pytest.param((1, (Anonymous(),)), 'a tuple differs between processes', id='in a tuple'),
        (Part(frozenset('ab')), 'a Part differs between processes'),
        ((1, Part((frozenset('ab'),))), 'a tuple differs between processes'),
        pytest.param(Part(Anonymous()), 'a Part differs between processes', id='in a dataclass'),
        pytest.param(lambda: 1, 'a function differs between processes', id='function'),
        pytest.param(Broken().__str__, 'a method differs between processes', id='method'),
        (Broken(), 'RuntimeError'),
    ],
)
def test_an_id_that_cannot_work_is_refused_with_the_reason(task_id: object, part: str) -> None:
    with pytest.raises(InvalidTaskId, match=part) as caught:
        check_task_id(task_id)
    assert len(str(caught.value)) < 400
    for base in (JobSyncError, ValueError, TypeError):
        assert isinstance(caught.value, base)


@pytest.mark.parametrize(
    'task_id',
    ['', 'x' * 2000, 'é' * 1000, 0, -1, 1.5, b'bytes', ('a', 1), uuid.UUID(int=7), Part(('{', 1))],
)
def test_an_id_at_the_limits_is_accepted(task_id: object) -> None:
    assert check_task_id(task_id) == str(task_id)


def test_an_unknown_function_is_refused_with_the_choice() -> None:
    with pytest.raises(ConfigurationError, match='double_sha256, md5, sha256'):
        task_to_token('a', 10, 'crc32')
    assert sorted(HASH_FUNCTIONS) == ['double_sha256', 'md5', 'sha256']
