"""Letting go of a broker connection that is of no use any more."""

from __future__ import annotations

from typing import Any

from ..logs import get_logger

__all__ = ['abandon']

logger = get_logger(__name__)


def abandon(connection: Any) -> None:
    """Drop a connection after an error, without a word to the broker.

    AMQP says good-bye and waits for the answer, for ever: a broker that takes nothing (a memory
    alarm) does not read it.
    """
    try:
        collect = getattr(
            getattr(connection, '_connection', None), 'collect', None
        )  # py-amqp's: it closes the socket
        if collect is not None:
            collect()
        connection.release()
    except Exception as error:  # it is broken already
        logger.debug('dropping a connection: %r', error)
