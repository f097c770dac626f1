"""Whether messages of a task go to the owner of their key, or run where they are taken."""

from __future__ import annotations

from collections.abc import Mapping

from ..errors import ConfigurationError
from ..ledger.once import ExactlyOnce
from .settings import PluginSettings

__all__ = ['check_affinity', 'has_affinity']


def check_affinity(name: str, once: ExactlyOnce | None, places: Mapping[str, object]) -> None:
    """Refuse a task that says both that its messages run anywhere and where they run.

    Args:
        name: The task's name.
        once: Its `exactly_once` options, if it has them.
        places: What says where its messages run, by the option's name; None where it says nothing.

    Raises:
        ConfigurationError: It says both.
    """
    if once is not None and once.affinity is False:
        _refuse_places(name, places, 'exactly_once(affinity=False)', 'one of the two')


def has_affinity(
    name: str, once: ExactlyOnce | None, places: Mapping[str, object], settings: PluginSettings
) -> bool:
    """Whether messages of a coordinated task go to the owner of their key.

    Args:
        name: The task's name.
        once: Its `exactly_once` options, if it has them. What they say counts before the settings.
        places: What says where its messages run, by the option's name; None where it says nothing.
        settings: The plugin's.

    Raises:
        ConfigurationError: Two of these contradict one another.
    """
    check_affinity(name, once, places)
    if once is not None and once.affinity is not None:
        if not once.affinity and settings.on_unclaimed == 'drop':
            raise ConfigurationError(
                f"{name}: on_unclaimed='drop' drops what another node owns, and with "
                'exactly_once(affinity=False) no node owns its messages, so that all would take '
                'each of them up: take one of the two out'
            )
        return once.affinity
    if not settings.affinity:
        remedy = 'one of the two' if once is None else 'it, or say exactly_once(affinity=True)'
        _refuse_places(name, places, 'the setting affinity=False', remedy)
    return settings.affinity


def _refuse_places(name: str, places: Mapping[str, object], said: str, remedy: str) -> None:
    for option, value in places.items():
        if value is not None:
            raise ConfigurationError(
                f'{name}: {option}={value!r} says where its messages run, and {said} lets them run '
                f'where they are taken: take out {remedy}'
            )
