"""Plain framework and plugin side by side: the same configuration, the same messages, the same end
state.

The plain side runs first, until its end state is the one that each kind of message promises. Its
end state is then what every side with the plugin must reach: the outcome that each sender sees,
what ran how often, and what is left in which queue.

**To add a framework**, write a module like `celery_side.py`:

1. An app made from an `Order` (`Order.from_environment()` in a worker process, the side's own
   `order` in the test process). Its tasks call `order.note(label)` each time that they do
   something; labels are compared as a multiset.
2. A table of `Kind`s: `send(sender)` sends the messages of one kind and returns what they are asked
   for later by `outcome`. `runs` is how many notes the plain framework leaves in the end,
   `outcomes` what its senders see.
3. A table of `Configuration`s: settings for the app, options for the command line, and which kinds
   are sent.
4. A subclass of `Side` with `command`, `sender`, `outcome`; then a test module like
   `test_celery.py`, which calls `compare`.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar

import pytest

from jobsync_core import CoordinationConfig
from tests.support.brokers import BrokerServer, die_with_parent
from tests.support.waiting import eventually

__all__ = [
    'LAST',
    'MODES',
    'Configuration',
    'EndState',
    'Kind',
    'Order',
    'Side',
    'cases',
    'compare',
    'order_of',
]

_ROOT = Path(__file__).parents[2]
_VARIABLE = 'PARITY_ORDER'
_START_SEC, _STOP_SEC, _SETTLE_SEC = 40.0, 60.0, 40.0
#: How the plugin takes part. 'idle': no task is coordinated; 'all': each is, by its message's id;
#: 'once': each completes once, too; 'free': the last without the rest, as affinity=False says.
MODES = ('idle', 'all', 'once', 'free')
#: The note of a message that is sent at the end, which is not compared.
LAST = 'last'
_LAST_COUNT = 6


@dataclass(frozen=True)
class Order:
    """What a process of a side is told.

    Args:
        broker, results: URLs; no results: the app has no result backend.
        notes: Path of the file of notes.
        mode: One of MODES, or 'plain'.
        database: URL of JobSync's database.
        configuration: Name of the configuration.
        settings: JobSync's settings.
    """

    broker: str
    results: str
    notes: str
    mode: str
    database: str
    configuration: str
    settings: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_environment(cls) -> Order:
        """The order of this process."""
        return cls(**json.loads(os.environ[_VARIABLE]))

    def environment(self) -> dict[str, str]:
        """The variable that tells it."""
        return {_VARIABLE: json.dumps(asdict(self))}

    def note(self, label: str) -> None:
        """Something ran: one line, written at once, whatever becomes of the process."""
        with open(self.notes, 'ab', buffering=0) as file:
            file.write(f'{label}\n'.encode())


@dataclass(frozen=True)
class Kind:
    """A kind of message.

    Args:
        name: Its name; labels of notes begin with it.
        send: Sends it through the side's sender; returns what `Side.outcome` is asked for, by
            label.
        runs: Notes that there are in the end.
        outcomes: What the plain framework's senders see, by label; compared as far as it is given.
        modes: The modes in which the plugin promises the same.
        brokers: The brokers on which it exists; what does on 'rabbitmq' does on 'quorum'.
    """

    name: str
    send: Callable[[Any], Mapping[str, Any]]
    runs: int
    outcomes: Mapping[str, str] = field(default_factory=dict)
    modes: Sequence[str] = MODES
    brokers: Sequence[str] = ('redis', 'rabbitmq')


@dataclass(frozen=True)
class Configuration:
    """A configuration.

    Args:
        name: Its name.
        settings: The framework's settings.
        options: Of the worker's command line.
        kinds: Names of the kinds that are sent; None: all.
        without: Names of kinds that mean something else here.
        brokers: The brokers on which it exists: 'redis', 'rabbitmq', 'quorum': a RabbitMQ 4 whose
            queues are quorum queues.
        modes: The modes that are compared with the plain side.
        broker: Query that is added to the broker's URL.
        left: What is left in queues in the end, by queue: dead letters.
        results: Whether there is a result backend.
        soak: Whether only `make soak` compares it.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    options: Sequence[str] = ()
    kinds: Sequence[str] | None = None
    without: Sequence[str] = ()
    brokers: Sequence[str] = ('redis', 'rabbitmq')
    modes: Sequence[str] = ('all',)
    left: Mapping[str, int] = field(default_factory=dict)
    results: bool = True
    soak: bool = False

    def __str__(self) -> str:
        return self.name

    def chosen(self, kinds: Iterable[Kind], broker: str, mode: str) -> list[Kind]:
        """The kinds that are sent and compared."""
        return [
            kind
            for kind in kinds
            if (self.kinds is None or kind.name in self.kinds)
            and kind.name not in self.without
            and {broker, *(['rabbitmq'] if broker == 'quorum' else [])} & {*kind.brokers}
            and (mode == 'plain' or mode in kind.modes)
        ]


@dataclass(frozen=True)
class EndState:
    """What can be seen from outside.

    Attributes:
        outcomes: What senders see, by kind and label.
        runs: Notes by label.
        left: Messages by queue, Celery's dead letters among them.
        dead: Dramatiq's dead letters, by queue.
    """

    outcomes: Mapping[str, str]
    runs: Mapping[str, int]
    left: Mapping[str, int]
    dead: Mapping[str, int]

    def differences(self, other: EndState) -> list[str]:
        """Where another one differs; one line for each."""
        found = []
        for name in ('outcomes', 'runs', 'left', 'dead'):
            mine, others = getattr(self, name), getattr(other, name)
            found += [
                f'{name} {key}: {mine.get(key)!r} against {others.get(key)!r}'
                for key in sorted({*mine, *others})
                if mine.get(key) != others.get(key)
            ]
        return found


class Side(ABC):
    """A cluster of two workers, plain or with the plugin; a context manager.

    Args:
        order: What its processes are told.
        configuration: Its configuration.
        server, space: The broker.
        directory: For logs.
    """

    #: What a worker prints when it consumes.
    ready: ClassVar[str]

    def __init__(
        self,
        order: Order,
        configuration: Configuration,
        server: BrokerServer,
        space: str,
        directory: Path,
    ) -> None:
        self.order, self.configuration, self.server, self.space, self.directory = (
            order,
            configuration,
            server,
            space,
            directory,
        )
        Path(order.notes).touch()
        self._asked: dict[str, Any] = {}
        self._workers: list[subprocess.Popen[bytes]] = []

    @abstractmethod
    def command(self, name: str) -> list[str]:
        """How a worker is started, with the flags that users use."""

    @abstractmethod
    def sender(self) -> Any:
        """What kinds send through. It has no plugin, so that the workers' gates see every
        message.
        """

    @abstractmethod
    def outcome(self, asked: Any) -> str:
        """What the sender of a message sees by now: without ids and addresses, which differ."""

    @abstractmethod
    def send_last(self) -> None:
        """Send one message whose task notes `LAST`."""

    @abstractmethod
    def close_sender(self) -> None:
        """Give back the sender's connections, if it was made."""

    def __enter__(self) -> Side:
        try:
            for name in ('one', 'two'):
                self._start(name)
            eventually(
                lambda: all(self._is_ready(name) for name in ('one', 'two')) or self._ended(),
                _START_SEC,
            )
            assert not self._ended(), self.report()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close_sender()
        for worker in self._workers:
            if worker.poll() is None:
                worker.send_signal(signal.SIGTERM)
        for worker in self._workers:
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.wait(_STOP_SEC if kind is None else 5)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(worker.pid, signal.SIGKILL)
            worker.wait()

    def _start(self, name: str) -> None:
        kept = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(('JOBSYNC_', 'CELERY_', 'PYTEST_'))
        }
        with (self.directory / f'{self.order.mode}-{name}.log').open('wb') as output:
            self._workers.append(
                subprocess.Popen(
                    self.command(name),
                    cwd=_ROOT,
                    env={
                        **kept,
                        **self.order.environment(),
                        'PYTHONUNBUFFERED': '1',
                        'C_FORCE_ROOT': '1',
                    },
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                    preexec_fn=die_with_parent(),
                )
            )

    def _log(self, name: str) -> str:
        return (self.directory / f'{self.order.mode}-{name}.log').read_text(errors='replace')

    def _is_ready(self, name: str) -> bool:
        return self.ready in self._log(name)

    def _ended(self) -> bool:
        return any(worker.poll() is not None for worker in self._workers)

    def send(self, kinds: Sequence[Kind]) -> None:
        """Send the messages of all kinds."""
        sender = self.sender()
        for kind in kinds:
            for label, asked in kind.send(sender).items():
                self._asked[f'{kind.name}{"." if label else ""}{label}'] = asked

    def state(self) -> EndState:
        """The state by now."""
        outcomes = (
            {label: self.outcome(asked) for label, asked in self._asked.items()}
            if self.configuration.results
            else {}
        )
        runs = Counter(Path(self.order.notes).read_text().splitlines())
        del runs[LAST]
        return EndState(
            outcomes,
            dict(runs),
            self.server.depths(self.space),
            self.server.dead_letters(self.space),
        )

    def finish(self) -> None:
        """Send a few messages more, and wait for them: what would have come twice has come by
        then.
        """
        for _ in range(_LAST_COUNT):
            self.send_last()
        eventually(
            lambda: (
                Path(self.order.notes).read_text().splitlines().count(LAST) >= _LAST_COUNT
                or self._ended()
            ),
            _SETTLE_SEC,
        )

    def report(self) -> str:
        """The ends of its workers' logs."""
        return '\n'.join(
            f'--- {self.order.mode}-{name}\n{self._log(name)[-3000:]}' for name in ('one', 'two')
        )


def _promised(state: EndState, kinds: Sequence[Kind], configuration: Configuration) -> list[str]:
    """What the plain side has not done yet of what the kinds promise."""
    missing = []
    for kind in kinds:
        runs = sum(
            count for label, count in state.runs.items() if label.partition('.')[0] == kind.name
        )
        if runs != kind.runs:
            missing.append(f'{kind.name}: {runs} runs, {kind.runs} promised')
        for label, outcome in kind.outcomes.items() if configuration.results else ():
            seen = state.outcomes.get(f'{kind.name}{"." if label else ""}{label}', '')
            if not seen.startswith(outcome):
                missing.append(f'{kind.name}.{label}: {seen!r}, {outcome!r} promised')
    if state.left != configuration.left:
        missing.append(f'left in queues: {state.left}')
    return missing


def _wait(
    side: Side, differences: Callable[[], list[str]], timeout: float = _SETTLE_SEC
) -> list[str]:
    """What still differs when it has settled, or when the time is over."""
    deadline = time.monotonic() + timeout
    while True:
        found = differences()
        if not found or time.monotonic() > deadline or side._ended():
            return found + (['a worker has ended'] if side._ended() else [])
        time.sleep(0.05)


def cases(configurations: Iterable[Configuration]) -> list[Any]:
    """Parameters of a test: each configuration with each of its brokers."""
    return [
        pytest.param(
            configuration,
            broker,
            id=f'{broker}-{configuration.name.replace(" ", "_")}',
            marks=[pytest.mark.soak] if configuration.soak else [],
        )
        for configuration in configurations
        for broker in configuration.brokers
    ]


def compare(
    make: Callable[[str], Side], kinds: Sequence[Kind], configuration: Configuration, broker: str
) -> None:
    """Run the plain side, then each side with the plugin, and compare their ends.

    Args:
        make: Makes a side of a mode.
        kinds: All kinds of messages.
        configuration: The configuration.
        broker: The broker's kind.

    Raises:
        AssertionError: They differ; the message has a line for each difference, and the logs.
    """
    with make('plain') as plain:
        chosen = configuration.chosen(kinds, broker, 'plain')
        assert chosen, 'nothing to send'
        plain.send(chosen)
        missing = _wait(plain, lambda: _promised(plain.state(), chosen, configuration))
        assert not missing, (
            'the plain framework does not do what the table says:\n'
            + '\n'.join(missing)
            + plain.report()
        )
        right = plain.state()
    for mode in configuration.modes:
        chosen = configuration.chosen(kinds, broker, mode)
        names = {kind.name for kind in chosen}
        expected = EndState(
            {key: value for key, value in right.outcomes.items() if key.partition('.')[0] in names},
            {key: value for key, value in right.runs.items() if key.partition('.')[0] in names},
            right.left,
            right.dead,
        )
        with make(mode) as side:
            side.send(chosen)
            different = _wait(side, lambda: expected.differences(side.state()))  # noqa: B023
            if not different:
                side.finish()
                different = _wait(side, lambda: expected.differences(side.state()), 5.0)  # noqa: B023
            assert not different, (
                f'plain against {mode}:\n' + '\n'.join(different) + '\n' + side.report()
            )


def order_of(
    mode: str,
    configuration: Configuration,
    server: BrokerServer,
    space: str,
    results: str,
    config: CoordinationConfig,
    directory: Path,
    settings: dict[str, Any],
) -> Order:
    """What the processes of a side are told."""
    return Order(
        broker=server.url(space),
        results=results,
        notes=str(directory / f'notes-{mode}'),
        mode=mode,
        database=f'postgresql://{config.user}:{config.password}@{config.host}:{config.port}/{config.dbname}',
        configuration=configuration.name,
        settings={**settings, 'appname': f'{mode}_'},
    )
