"""Whether a message is to blame for an error, or some server, this process, its machine."""

from __future__ import annotations

import pickle
import struct

from amqp.exceptions import FrameSyntaxError
from celery.exceptions import InvalidTaskError
from kombu.exceptions import ContentDisallowed, SerializationError

__all__ = ['is_its_fault']

#: What fails like this fails every time, on every worker.
_ITS_FAULT = (
    TypeError,
    ValueError,
    AttributeError,
    ArithmeticError,
    LookupError,
    RecursionError,
    InvalidTaskError,
    ContentDisallowed,
    SerializationError,
    pickle.PickleError,
    struct.error,
    FrameSyntaxError,
)
#: Some of these are ValueErrors too: a certificate that cannot be verified is one.
_NOT_ITS_FAULT = (OSError, MemoryError)


def is_its_fault(error: BaseException) -> bool:
    """Whether a message is to blame for an error. Everything else is the trouble of some server, of
    this process or of its machine.
    """
    return isinstance(error, _ITS_FAULT) and not isinstance(error, _NOT_ITS_FAULT)
