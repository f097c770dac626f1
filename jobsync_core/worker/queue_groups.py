"""Queue groups: which home queues share a ring of tokens. Each queue is a group of its own, unless
a setting names several that have the same consumers anyway.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from ..assignment.arguments import check_group
from ..errors import ConfigurationError
from ..store.queues import Division

__all__ = ['check_queue_groups', 'disagreements', 'divided', 'group_of', 'whole_groups']

#: What there is to do where nodes group a queue in different ways.
REMEDY = (
    'give all workers that consume these queues the same queue_groups; docs/QUEUES.md tells in '
    'which order to change it'
)
#: Nodes that are named of each group.
_NAMED = 3
_EXAMPLE = "give a mapping such as {'fast': ['high', 'low']}"


def check_queue_groups(value: object) -> dict[str, tuple[str, ...]]:
    """The setting `queue_groups`: a group's name -> its queues.

    Raises:
        ConfigurationError: It is none, or names a queue twice.
    """
    if not isinstance(value, Mapping):
        raise ConfigurationError(f'queue_groups={value!r}: {_EXAMPLE}')
    found: dict[str, tuple[str, ...]] = {}
    seen: dict[str, str] = {}
    for name, queues in value.items():
        if not isinstance(name, str) or not name:
            raise ConfigurationError(f'queue_groups: {name!r} is no name; {_EXAMPLE}')
        _check(name)
        if isinstance(queues, str) or not isinstance(queues, Collection) or not queues:
            raise ConfigurationError(
                f'queue_groups: {name!r} has {queues!r} in place of a list of queues; {_EXAMPLE}'
            )
        for queue in queues:
            if not isinstance(queue, str) or not queue:
                raise ConfigurationError(f'queue_groups: {queue!r} in {name!r} is no queue')
            _check(queue)
            if queue in seen:
                raise ConfigurationError(
                    f'queue_groups: the queue {queue!r} is in {seen[queue]!r} and in {name!r}; a '
                    'queue has one group'
                )
            seen[queue] = name
        found[name] = tuple(queues)
    for name in found:
        if seen.get(name, name) != name:
            raise ConfigurationError(
                f'queue_groups: {name!r} is the name of a group and of a queue of '
                f'{seen[name]!r}; give the group another name'
            )
    return found


def _check(name: str) -> None:
    try:
        check_group(name)
    except ConfigurationError as error:
        raise ConfigurationError(f'queue_groups: {error}') from None


def group_of(groups: Mapping[str, Collection[str]], home: str) -> str:
    """The group of a home queue.

    Args:
        groups: The setting.
        home: The queue.
    """
    if not groups:
        return home
    return next((name for name, queues in groups.items() if home in queues), home)


def divided(groups: Mapping[str, Collection[str]], homes: Iterable[str]) -> str:
    """Why a worker that consumes these queues would divide a group: it would own keys of a queue
    that it does not consume. '' where it does not; else with the remedy.

    Args:
        groups: The setting.
        homes: The queues that the worker consumes.
    """
    consumed = {*homes}
    for name, queues in groups.items():
        lacking = sorted({*queues} - consumed)
        if lacking and consumed & {*queues, name}:
            there = sorted(consumed & {*queues, name})
            return (
                f'the queues {_names(queues)} are one group, {name!r} (queue_groups), and this '
                f'worker consumes {_names(there)} and not {_names(lacking)}: let it consume all '
                'of them or none, or take those that have other consumers out of the group'
            )
        if name in consumed - {*queues}:
            return (
                f'{name!r} is a group of {_names(queues)} (queue_groups), and a queue of its own '
                'that this worker consumes: give the group another name'
            )
    return ''


def whole_groups(groups: Mapping[str, Collection[str]], homes: Iterable[str]) -> tuple[str, ...]:
    """The groups that a worker belongs to which consumes these queues: those of which it consumes
    all.

    Args:
        groups: The setting.
        homes: The queues.
    """
    consumed = {*homes}
    mine = {group_of(groups, home) for home in consumed}
    return tuple(sorted(name for name in mine if consumed.issuperset(groups.get(name, ()))))


def disagreements(found: Iterable[Division]) -> list[str]:
    """A sentence for each home queue that nodes give different queue groups.

    Args:
        found: What each of the nodes gives it.
    """
    told: dict[str, list[str]] = {}
    for each in found:
        more = len(each.nodes) - _NAMED
        nodes = ', '.join(each.nodes[:_NAMED]) + (f' and {more} more' if more > 0 else '')
        told.setdefault(each.home, []).append(f'{each.group!r} for {nodes}')
    return [
        f'the queue {home!r} is in the group {" and ".join(groups)} (queue_groups): each of its '
        'keys has an owner in each of them, and may run on both at a time'
        for home, groups in told.items()
    ]


def _names(queues: Iterable[str]) -> str:
    return ', '.join(map(repr, queues))
