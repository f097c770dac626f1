"""What the simulated store promises, and the real one has to, told one request at a time."""

from __future__ import annotations

from jobsync_core.process import Process
from jobsync_core.protocol.messages import Reply
from jobsync_core.protocol.messages.leadership import (
    Evict,
    EvictReply,
    Lead,
    Observe,
    ObserveReply,
    RoundReply,
)
from jobsync_core.protocol.messages.membership import Join

from .store import SimStore

PROCESS = Process('host', 'boot', 'ns', 1, '')


def is_stale(reply: Reply) -> bool:
    assert isinstance(reply, ObserveReply)
    return reply.stale


def test_a_life_that_was_evicted_and_joins_again_is_planned_for() -> None:
    """Its answers were lost for a timeout, and it goes on asking under the same life."""
    store = SimStore(10)
    joins = [Join(name, f'life of {name}', PROCESS, 1.0, True) for name in ('a', 'b')]
    for join in joins:
        store.handle(join)
    lead = Lead('a', 'life of a', (), 'test')
    assert store.handle(lead) == RoundReply(True, 1) and not is_stale(store.handle(Observe()))
    sign = store.nodes['b'].sign
    assert store.handle(Evict('a', 'life of a', (sign,))) == EvictReply(True, ('b',))
    store.handle(joins[1])
    assert is_stale(store.handle(Observe()))
    store.handle(lead)
    assert [row.node for row in store.segments] == ['a', 'b']
