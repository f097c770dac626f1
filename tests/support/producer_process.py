"""A process that only sends: it says how long it waits for owners, on stdout, a JSON line each."""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

from jobsync_core import CoordinationConfig


def main() -> None:
    """Look up owners, fork, look up more in the child, and end; settings are the first argument."""
    from jobsync_core.worker.lookup import OwnerLookup
    from jobsync_core.worker.settings import PluginSettings

    settings = PluginSettings(config=CoordinationConfig(**json.loads(sys.argv[1])))
    lookup = OwnerLookup(lambda: settings, lambda: None)
    _ask(lookup, 'parent')
    child = os.fork()
    _ask(lookup, 'parent' if child else 'child')
    if child:
        os.waitpid(child, 0)
    _say('ends')


def _ask(lookup: Any, who: str) -> None:
    for number in range(20):
        before = time.monotonic()
        queue = lookup.queue_of(f'order-{number}')
        _say(who, sec=time.monotonic() - before, queue=queue)


def _say(what: str, **more: object) -> None:
    sys.stdout.write(json.dumps({'what': what, 'at': time.monotonic(), **more}) + '\n')
    sys.stdout.flush()


if __name__ == '__main__':
    main()
