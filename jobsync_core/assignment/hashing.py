"""From task ids to tokens. The mapping is part of the database's contents: it never changes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from hashlib import blake2b
from importlib import import_module
from struct import Struct
from types import MappingProxyType
from typing import Any

from ..errors import ConfigurationError, InvalidTaskId
from .stable import has_address, unstable_part

__all__ = ['HASH_FUNCTIONS', 'check_task_id', 'task_digest', 'task_key', 'task_to_token']

#: What PostgreSQL can index in one text column, with room for the other columns of the key.
MAX_BYTES = 2000


def _fastest(name: str, *modules: str) -> Callable[[bytes], Any]:
    """Python's own implementation where there is one: for a few bytes it takes half the time of
    hashlib's, which calls OpenSSL.
    """
    for module in modules:
        with suppress(ImportError, AttributeError):
            found: Callable[[bytes], Any] = getattr(import_module(module), name)
            return found
    return partial(getattr(hashlib, name), usedforsecurity=False)


_md5_of = _fastest('md5', '_md5')
_sha256_of = _fastest('sha256', '_sha2', '_sha256')
_first_8_bytes = Struct('>Q').unpack_from


def _md5(data: bytes) -> int:
    return int.from_bytes(_md5_of(data).digest(), 'big')


def _sha256(data: bytes) -> int:
    number: int = _first_8_bytes(_sha256_of(data).digest())[0]
    return number


def _double_sha256(data: bytes) -> int:
    number: int = _first_8_bytes(_sha256_of(_sha256_of(data).digest()).digest())[0]
    return number


#: From a task id's encoded text to a non-negative number; the token is this number modulo
#: total_tokens.
HASH_FUNCTIONS: Mapping[str, Callable[[bytes], int]] = MappingProxyType(
    {'double_sha256': _double_sha256, 'md5': _md5, 'sha256': _sha256}
)


def check_task_id(task_id: object) -> str:
    """The text of a task id: what is hashed, locked and stored.

    Args:
        task_id: Any hashable value whose text is the same in every process.

    Raises:
        InvalidTaskId: It is None, unhashable, has no stable text, contains NUL, cannot be encoded,
            or is longer than 2000 bytes.
    """
    text = task_id if type(task_id) is str else _text(task_id)
    if '\0' in text:
        raise InvalidTaskId(
            f'task id {_short(text)} contains a NUL character, which PostgreSQL cannot store: '
            'remove it'
        )
    if not text.isascii() or len(text) > MAX_BYTES:
        try:
            length = len(text.encode())
        except UnicodeEncodeError:
            raise InvalidTaskId(
                f'task id {_short(text)} cannot be encoded as UTF-8: remove lone surrogates'
            ) from None
        if length > MAX_BYTES:
            raise InvalidTaskId(
                f'task id {_short(text)} takes {length} bytes, {MAX_BYTES} at most: use a shorter '
                'id, or a digest of it'
            )
    return text


def _text(task_id: object) -> str:
    if type(task_id) is int:
        return _converted(task_id)
    if task_id is None:
        raise InvalidTaskId('the task id is None: give the id of the task')
    try:
        hash(task_id)
    except TypeError:
        raise InvalidTaskId(
            f'a task id of type {type(task_id).__name__} is not hashable: use a string, a number '
            'or a tuple'
        ) from None
    kind = type(task_id)
    if not _unstable(task_id):
        text = _converted(task_id)
        if isinstance(task_id, str) or not (has_address(text) or unstable_part(task_id, text)):
            return text
    raise InvalidTaskId(
        f'the text of a {kind.__name__} differs between processes, so that it cannot be a task '
        'id: use a string, or define __str__'
    )


def _unstable(task_id: object) -> bool:
    if isinstance(task_id, tuple):
        return any(_unstable(item) for item in task_id)
    kind = type(task_id)
    return isinstance(task_id, frozenset) or (
        kind.__str__ is object.__str__ and kind.__repr__ is object.__repr__
    )


def _converted(task_id: object) -> str:
    try:
        # A subclass of str would keep its type, and its behaviour.
        return ''.join(str(task_id))
    except Exception as error:
        raise InvalidTaskId(
            f'a task id of type {type(task_id).__name__} has no text ({type(error).__name__}): '
            'use a string'
        ) from error


def _short(text: str) -> str:
    return ascii(text if len(text) <= 60 else text[:57] + '...')


def task_to_token(task_id: object, total_tokens: int, hash_function: str = 'double_sha256') -> int:
    """The token that a task id hashes to, 0 to total_tokens-1.

    Args:
        task_id: As for `check_task_id`.
        total_tokens: Tokens of the cluster.
        hash_function: A name in HASH_FUNCTIONS.

    Raises:
        InvalidTaskId: As `check_task_id`.
        ConfigurationError: The hash function is unknown.
    """
    digest = HASH_FUNCTIONS.get(hash_function)
    if digest is None:
        raise ConfigurationError(
            f'hash_function={hash_function!r} is unknown: use one of '
            f'{", ".join(sorted(HASH_FUNCTIONS))}'
        )
    return digest(check_task_id(task_id).encode()) % total_tokens


def task_key(text: str) -> int:
    """A signed 64-bit digest of a task id's text, for sets that would be too large as text."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), 'big', signed=True)


def task_digest(text: str) -> int:
    """An unsigned 64-bit digest of a task id's text which PostgreSQL can compute as well: the first
    8 bytes of its SHA-256.
    """
    number: int = _first_8_bytes(_sha256_of(text.encode()).digest())[0]
    return number
