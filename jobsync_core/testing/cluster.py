"""Several nodes in one process, on a real database."""

from __future__ import annotations

import threading
import time
from typing import Any

from ..config import CoordinationConfig
from ..job import Job

__all__ = ['Cluster']

#: Seconds between two looks at who owns what.
_LOOK_SEC = 0.01


class Cluster:
    """Nodes of one cluster, all in this process: real Jobs with real hand-overs between them.

    Args:
        config: The cluster.
    """

    def __init__(self, config: CoordinationConfig) -> None:
        self.config = config
        self.jobs: list[Job] = []

    def join(self, *names: str, settle: bool = True, **options: Any) -> list[Job]:
        """Enter nodes of these names at the same time, and return their Jobs.

        Args:
            names: The nodes.
            settle: Wait until all nodes share all tokens. Not for locks that match no node: their
                tokens stay without an owner.
            options: Arguments of Job for each of them.
        """
        jobs = [Job(name, self.config, **{'wait_on_enter': 0, **options}) for name in names]
        failures: list[BaseException] = []

        def enter(job: Job) -> None:
            try:
                job.__enter__()
                self.jobs.append(job)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=enter, args=(job,)) for job in jobs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]
        if settle:
            self.settle()
        return jobs

    def leave(self, job: Job) -> None:
        """Let a node leave; the others take its tokens over."""
        self.jobs.remove(job)
        job.__exit__(None, None, None)

    def settle(self, timeout: float = 30.0) -> None:
        """Wait until the nodes share all tokens, each of them some.

        Raises:
            AssertionError: They do not within `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        while True:
            shares = {job.node_name: len(job.my_tokens) for job in self.jobs}
            if sum(shares.values()) == self.config.total_tokens and all(shares.values()):
                return
            if time.monotonic() > deadline:
                raise AssertionError(
                    f'the nodes do not share all {self.config.total_tokens} tokens within '
                    f'{timeout} s: {shares}'
                )
            time.sleep(_LOOK_SEC)

    def close(self) -> None:
        """Let all nodes leave."""
        while self.jobs:
            self.jobs.pop().__exit__(None, None, None)
