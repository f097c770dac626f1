"""What a forked child does with its parent's connections: it lets go of their sockets at once, and
says nothing on them.

A child that kept them would keep them open when its parent is killed: the server would go on
waiting for a client that is gone, with its transaction and all its locks. To close them properly
would say good-bye in the parent's name.
"""

from __future__ import annotations

import contextlib
import os
import weakref

import psycopg2
import psycopg2.extensions

__all__ = ['leave_to_parent']

_open: dict[int, weakref.ref[psycopg2.extensions.connection]] = {}


def leave_to_parent(connection: psycopg2.extensions.connection) -> None:
    """Have children that this process forks from now on let go of the connection's socket."""
    number = id(connection)
    _open[number] = weakref.ref(connection, lambda _: _open.pop(number, None))


def _let_go() -> None:
    inherited = list(_open.values())
    _open.clear()
    try:
        nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    except OSError:  # no descriptor is free: better closed than kept
        nothing = -1
    for reference in inherited:
        connection = reference()
        if connection is None:
            continue
        # psycopg2 never closes a connection of another process by itself, and an explicit close()
        # closes this number, whatever it is by then. So the number stays taken: whatever libpq does
        # with it ends nowhere.
        with contextlib.suppress(OSError, psycopg2.Error, ValueError):
            number = connection.fileno()
            if nothing >= 0:
                os.dup2(nothing, number, inheritable=False)
            else:
                os.close(number)
    if nothing >= 0:
        os.close(nothing)


if hasattr(os, 'register_at_fork'):
    os.register_at_fork(after_in_child=_let_go)
