"""Who belongs to one cluster: workers of one framework, at one broker, of one application; or plain
Jobs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ['Belonging', 'Peer', 'stranger']

_PLAIN = 'a plain Job'


@dataclass(frozen=True)
class Belonging:
    """What a node belongs to.

    Attributes:
        kind: The framework whose worker it is; '' for a plain Job.
        broker: The mark of its broker, by whatever address it is reached; '' where that is not
            known.
        place: The broker's address, without a password; for people.
        application: The application's name; '' where it has none.
    """

    kind: str = ''
    broker: str = ''
    place: str = ''
    application: str = ''

    def __str__(self) -> str:
        if not self.kind:
            return _PLAIN
        return (
            f'a {self.kind} worker of application {self.application or "without a name"!r} at '
            f'{self.place or "an unknown broker"}'
        )


@dataclass(frozen=True)
class Peer:
    """Another live node of the cluster, and what it belongs to."""

    node: str
    belonging: Belonging


def stranger(mine: Belonging, peers: Sequence[Peer], appname: str) -> str | None:
    """Why a node cannot be in one cluster with one of the others, and the remedy; None where it
    can.

    Args:
        mine: What the node belongs to.
        peers: The live nodes.
        appname: The cluster's prefix.
    """
    for peer in peers:
        other = peer.belonging
        if mine.kind != other.kind:
            why = 'they do not work on the same messages'
        elif mine.broker and other.broker and mine.broker != other.broker:
            why = 'messages that belong to one would never reach the other'
        elif mine.application and other.application and mine.application != other.application:
            why = (
                'one does not know the tasks of the other; if they are one application, name it '
                'with the setting application'
            )
        else:
            continue
        return (
            f'appname={appname!r} is the cluster of node {peer.node!r}, {other}, and this is '
            f'{mine}: {why}. Give one of the two '
            'projects another appname; if that node died a moment ago, try again after the '
            'heartbeat timeout'
        )
    return None
