"""The Dramatiq plugin at work: workers share the standard library's source files, each counted
once, though one worker is killed.

Run `python examples/dramatiq_demo.py` (or `make demo DEMO=dramatiq`). It starts a PostgreSQL and a
Redis of its own and three `dramatiq` masters with one worker process each, sends one message per
file, a tenth of them twice, kills one worker with SIGKILL midway, lets another join, and reads the
verdict from the database. Heartbeats are shortened (0.5 s, dead after 2 s; the defaults are 5 s and
15 s) so that all of it takes less than a minute. The actors are in dramatiq_actors.py.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

sys.path.insert(
    0, str(Path(__file__).resolve().parents[1])
)  # works from a checkout without an installation

from dramatiq.results import ResultFailure, ResultMissing

from examples.core_demo import PINNED
from examples.demo_queues import SLOTS, QueueDemo, main
from jobsync_core.embedded.redis import EmbeddedRedis


@dataclass
class DramatiqDemo(QueueDemo):
    """One run with Dramatiq workers."""

    framework: ClassVar[str] = 'Dramatiq'
    pin: ClassVar[str] = '%-gpu'

    @staticmethod
    def environment(redis: EmbeddedRedis) -> dict[str, str]:
        return {'DEMO_BROKER_URL': redis.url()}

    def worker_of(self, node: str) -> str:
        # The master's process id, the number of its child, and the child's start follow.
        return re.sub(r'@\d+-\d+-[0-9a-f]+$', '', node)

    def command(self, name: str) -> list[str]:
        return ['-m', 'dramatiq', 'examples.dramatiq_actors', '-p', '1', '-t', str(SLOTS)]

    def send(self, path: str) -> Any:
        from examples.dramatiq_actors import count_file, count_on_gpu  # the broker is known by now

        return (count_on_gpu if path.startswith(PINNED) else count_file).send(path)

    def answer(self, sent: Any) -> Any:
        try:
            return sent.get_result()
        except ResultMissing:
            return None
        except ResultFailure as error:
            return str(error)


if __name__ == '__main__':
    sys.exit(main(DramatiqDemo, __doc__ or ''))
