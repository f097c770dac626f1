"""How often a message was a dead letter, over all of its copies: RabbitMQ counts it in `x-death`,
which tasks read to give up in time, and for each copy from zero.

A copy does not carry `x-death` itself: RabbitMQ would take it for a message that goes round in
circles, and drop it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ['DEATHS', 'KEPT_DEATHS', 'as_it_came', 'deaths_of', 'of_copy', 'show_deaths']

#: The header of RabbitMQ, and the one in which a copy carries what its forerunners had in it.
DEATHS, KEPT_DEATHS = 'x-death', 'jobsync_deaths'
_CAME = 'jobsync_came'
#: The most that is counted; more than AMQP can write could not be passed on.
_MOST = 2**31 - 1


def deaths_of(headers: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All deaths of a message, its newest copy's first, one for each queue and reason."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for part in (DEATHS, KEPT_DEATHS):
        for death in _read(headers.get(part)):
            place = str(death.get('queue')), str(death.get('reason'))
            known = found.setdefault(place, {**death, 'count': 0})
            known['count'] = min(known['count'] + death['count'], _MOST)
    return list(found.values())


def of_copy(headers: Mapping[str, Any]) -> dict[str, Any]:
    """The headers with which a copy of a message is sent."""
    deaths = deaths_of(headers)
    rest = {name: value for name, value in headers.items() if name not in (DEATHS, KEPT_DEATHS)}
    return {**rest, KEPT_DEATHS: deaths} if deaths else rest


def show_deaths(message: Any) -> None:
    """Have a task see the deaths of all copies of its message, where it would see those of one."""
    headers = message.headers
    if isinstance(headers, dict) and KEPT_DEATHS in headers:
        vars(message)[_CAME] = dict(headers)
        headers[DEATHS] = deaths_of(headers)
        del headers[KEPT_DEATHS]


def as_it_came(message: Any) -> Any:
    """The headers of a message before `show_deaths`: whether it is a dead letter itself."""
    return getattr(message, _CAME, message.headers)


def _read(deaths: object) -> Iterator[Mapping[str, Any]]:
    """Whoever sends a message may write anything there."""
    for death in deaths if isinstance(deaths, list) else ():
        count = death.get('count') if isinstance(death, Mapping) else None
        if type(count) is int and count >= 0:
            yield death
