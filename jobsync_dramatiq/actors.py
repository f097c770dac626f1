"""Which actors of a broker are coordinated, and how their messages get their routes."""

from __future__ import annotations

import difflib
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from typing import Any

from dramatiq import GenericActor
from dramatiq.common import q_name

from jobsync_core.errors import ConfigurationError
from jobsync_core.ledger.once import ExactlyOnce
from jobsync_core.logs import Repeats, get_logger, shown
from jobsync_core.worker.adapter import CoordinatedTasks, Declared, once_of
from jobsync_core.worker.affinity import check_affinity
from jobsync_core.worker.incoming import Refused, Stamps, find_route
from jobsync_core.worker.misspelt import said_elsewhere
from jobsync_core.worker.routing import HOME, HOPS, KEY, WAITS, is_of_cluster
from jobsync_core.worker.settings import PluginSettings, combined

from .errors import DeclarationRefused
from .incoming import Said
from .once import function_of, is_ours

__all__ = [
    'OPTIONS',
    'ActorOptions',
    'Actors',
    'check_actor',
    'check_message',
    'once_of_actor',
    'read_settings',
]

logger = get_logger(__name__)

#: What an actor may say.
OPTIONS = ('jobsync_key', 'jobsync_pin')
#: What the plugin writes on messages.
_STAMPS = frozenset({KEY, HOPS, HOME, WAITS})
_repeats = Repeats(math.inf)
#: Characters of a key that stays short enough whatever scope is put before it.
_SURELY_SHORT = 200


def read_settings(given: Mapping[str, Any]) -> PluginSettings:
    """Settings from `JobSync(…)`, then Django's DRAMATIQ_JOBSYNC or JOBSYNC, then the environment.

    Raises:
        ConfigurationError: A setting cannot work.
    """
    group: object = {}
    if 'django' in sys.modules:
        from django.conf import settings

        if (
            settings.configured or 'DJANGO_SETTINGS_MODULE' in os.environ
        ):  # the module is read when something is asked of it
            group = (
                getattr(settings, 'DRAMATIQ_JOBSYNC', None)
                or getattr(settings, 'JOBSYNC', None)
                or {}
            )
    if not isinstance(group, Mapping):
        raise ConfigurationError(
            f"DRAMATIQ_JOBSYNC={group!r}: give a dict such as {{'database_url': 'postgresql://…'}}"
        )
    return PluginSettings.read(combined(group, given))


class ActorOptions(Set[str]):
    """The options of actors that the plugin has, for a broker, which refuses all others.

    No `set`, so that what a broker keeps of it is made here: Dramatiq says of a misspelt one that a
    middleware may be missing.

    Args:
        names: The options.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._names = frozenset(names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __ror__(self, others: Iterable[str]) -> Any:
        return _Known(self._names, others)


class _Known(set[str]):
    """All options of actors that a broker knows."""

    def __init__(self, ours: frozenset[str], others: Iterable[str]) -> None:
        super().__init__(ours.union(others))
        self._ours = ours

    def __rsub__(self, given: Set[Any]) -> set[str]:
        unknown = set(given).difference(self)
        for name in sorted(unknown):
            if str(name).startswith('jobsync'):
                hint = said_elsewhere(name) or _near(name, self._ours)
                raise DeclarationRefused(f'unknown actor option {name!r}{hint}')
        return unknown


def _near(name: str, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(name, list(known), 1, 0.8)  # all of them begin alike
    return f': did you mean {found[0]!r}?' if found else f': there are {", ".join(sorted(known))}'


def check_message(message: Any) -> None:
    """Warn, once, of options of a message that mean nothing: those of actors, and misspelt ones."""
    for name in message.options:
        if (
            name.startswith('jobsync_')
            and name not in _STAMPS
            and _repeats.say((message.actor_name, name), 0.0) is not None
        ):
            near = (difflib.get_close_matches(name, OPTIONS, 1) or OPTIONS)[0]
            logger.warning(
                'actor=%s: the message option %s does nothing; key and pin are options of the '
                'actor: @dramatiq.actor(%s=…)',
                message.actor_name,
                name,
                near,
            )


class Actors(CoordinatedTasks):
    """The coordinated actors of a broker.

    Args:
        broker: The broker.
        settings: The plugin's.

    Attributes:
        appname: The cluster.
    """

    def __init__(self, broker: Any, settings: PluginSettings) -> None:
        super().__init__(settings, self._declaration, lambda: broker.actors)
        self._broker = broker
        self.appname = settings.config.appname

    def pin_of(self, name: str) -> Sequence[str] | None:
        """The patterns of a pinned actor; None where an actor has no pin."""
        found = self.find(name)
        return found.pin if found is not None else None

    def is_known(self, message: Any) -> bool:
        """Whether this process has the message's actor."""
        return message.actor_name in self._broker.actors

    def route_of(self, message: Any) -> str | None:
        """The route of a message that is being sent; None where its actor has no affinity or is not
        coordinated.

        Raises:
            ConfigurationError, TypeError, InvalidTaskId: The arguments make no key.
        """
        found = self.find(message.actor_name)
        return (
            found.route_of(message.args, message.kwargs, message.message_id)
            if found is not None
            else None
        )

    def read_route(self, message: Any, stamps: Stamps) -> str | Refused | None:
        """The route of a message that was received, or why it has none; None where its actor has no
        affinity or is not coordinated.

        Args:
            message: The message.
            stamps: What JobSync wrote on it. Its key counts for an actor that only another process
                knows.
        """
        found = self.find(message.actor_name)
        if found is None:
            return None if self.is_known(message) else stamps.key
        route = find_route(found, message.args, message.kwargs, message.message_id, stamps)
        once = found.once if found.once is not None and found.once.has_key else None
        if isinstance(route, Refused) or once is None:
            return route
        if route is None or self._keys_differ(message.actor_name) or len(route) > _SURELY_SHORT:
            return self._ledger_problem(once, message) or route
        return route

    def has_queue(self, name: str) -> bool:
        """Whether a queue, or a delay queue, is one of the user's that are declared here."""
        return (
            q_name(name) in self._broker.queues
            and not is_of_cluster(name, self.appname)
            and not name.endswith('.XQ')  # of which Dramatiq's q_name cuts off the end as well
        )

    def home_of(self, message: Any, stamp: str | None) -> str:
        """The queue that a message was sent to which came by a node's queue.

        Args:
            message: The message.
            stamp: What it says itself, which may be forged: its dead letters would be in a queue
                that nobody looks at.
        """
        if stamp is not None and self.has_queue(stamp):
            return stamp
        actor = self._broker.actors.get(message.actor_name)
        if actor is not None:
            return str(actor.queue_name)
        return stamp if stamp is not None and not is_of_cluster(stamp, self.appname) else 'default'

    def home_of_unreadable(self, said: Said) -> str | None:
        """The queue to which a message was sent that no worker can have; None where nothing tells.

        Args:
            said: What it says itself. Only a queue that is declared here counts, as nobody looks at
                others.
        """
        if said.stamp is not None and self.has_queue(said.stamp):
            return said.stamp
        actor = self._broker.actors.get(said.actor) if said.actor is not None else None
        if actor is not None:
            return str(actor.queue_name)
        if said.queue is not None and self.has_queue(said.queue):
            return said.queue
        queues = {str(each.queue_name) for each in self._broker.actors.values()}
        if len(queues) == 1:
            return queues.pop()
        return 'default' if 'default' in queues else None

    def _keys_differ(self, name: str) -> bool:
        """Whether what completes once is another key than the one that says where a message
        runs.
        """
        return self._broker.actors[name].options.get('jobsync_key') is not None

    def _ledger_problem(self, once: ExactlyOnce, message: Any) -> Refused | None:
        function = self._broker.actors[message.actor_name].fn
        args = (function, *message.args) if isinstance(function, GenericActor) else message.args
        try:
            once.ledger_key_of(args, message.kwargs)
        except Exception as error:  # whatever a key function raises
            return Refused(
                f'no key of exactly_once can be made for it: {type(error).__name__}: {shown(error)}'
            )
        return None

    def _declaration(self, name: str) -> Declared | None:
        actor = self._broker.actors.get(name)
        if actor is None:
            return None
        key, prepare = actor.options.get('jobsync_key'), None
        if key is None and isinstance(actor.fn, GenericActor):
            prepare = _with_self(actor.fn)
        return Declared(
            function_of(actor),
            once_of_actor(actor),
            key,
            actor.options.get('jobsync_pin'),
            prepare=prepare,
        )


def once_of_actor(actor: Any) -> ExactlyOnce | None:
    """The `exactly_once` options of an actor; None where it has none."""
    return once_of(function_of(actor))


def check_actor(actor: Any) -> None:
    """Refuse an actor whose `exactly_once` cannot work; its keys begin with the actor's name from
    now on, also where it is called.

    Raises:
        DeclarationRefused: It is not the plugin's own, it says affinity=False beside a key or a
            pin, another actor has the same function, or the name can be another one's.
    """
    once = once_of_actor(actor)
    if once is None:
        return
    if not is_ours(once):
        raise DeclarationRefused(
            f"actor {actor.actor_name!r} has an exactly_once that is not Dramatiq's: a message "
            'whose key is running would fail instead of '
            'coming back. Write `from jobsync_dramatiq import exactly_once`, and put it below '
            '@dramatiq.actor'
        )
    try:
        places = {name: actor.options.get(name) for name in OPTIONS}
        check_affinity(actor.actor_name, once, places)
        once.adopt(actor.actor_name)
    except ConfigurationError as error:
        raise DeclarationRefused(str(error)) from error


def _with_self(
    instance: object,
) -> Callable[[Sequence[Any], Mapping[str, Any]], tuple[Sequence[Any], Mapping[str, Any]]]:
    # A method's options were made from a function that takes `self`; a message has none.
    return lambda args, kwargs: ((instance, *args), kwargs)
