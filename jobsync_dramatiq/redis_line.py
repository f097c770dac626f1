"""Scripts on connections to Redis that are kept: what redis-py does around each command takes
longer than the command itself.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from redis.exceptions import NoScriptError

__all__ = ['Line']

#: Seconds to wait for an answer where the client's user has not said for how long. No script here
#: takes long.
_ANSWER_SEC = 10.0


class Line:
    """Runs scripts, each thread's on a connection of its own, and each once: nothing is tried
    again.

    Args:
        client: The broker's redis-py client.
    """

    def __init__(self, client: Any) -> None:
        self._client = client
        self._own = threading.local()

    def run(self, script: Any, keys: Sequence[str], args: Sequence[Any]) -> Any:
        """Run a script; its answer.

        Args:
            script: What the client's `register_script` returned.
            keys: Its keys.
            args: Its arguments.

        Raises:
            RedisError, OSError: It is not known whether it was run.
        """
        connection = self._connection()
        if connection is None:
            return script(keys=keys, args=args)
        try:
            return self._do(connection, 'EVALSHA', script.sha, keys, args)
        except NoScriptError:
            return self._do(connection, 'EVAL', script.script, keys, args)

    def _connection(self) -> Any:
        found = getattr(self._own, 'connection', None)
        if found is None:
            # Not taken from the pool, whose size may be bounded. A client of a Redis Cluster has
            # none.
            pool = getattr(self._client, 'connection_pool', None)
            if pool is None:
                return None
            known = dict(pool.connection_kwargs)
            if (
                known.get('socket_timeout') is None
                # before redis-py 8: a network that swallows the answer would hang the thread for
                # ever
            ):
                known['socket_timeout'] = _ANSWER_SEC
            found = self._own.connection = pool.connection_class(**known)
        return found

    @staticmethod
    def _do(
        connection: Any, command: str, script: Any, keys: Sequence[str], args: Sequence[Any]
    ) -> Any:
        # Whatever goes wrong here ends the connection; the next command makes another one.
        connection.send_command(command, script, len(keys), *keys, *args)
        return connection.read_response()
