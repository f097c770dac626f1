"""What becomes of a delivery."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest

from jobsync_core.worker.inbox import Action, Here, Outcome, Received, Rules, may_begin, place

#: A message that belongs to n2 and is here at n1 for the first time; the time is 100.
DELIVERY = Received('life-1', 'order-1', until=102.0, home='jobs')
HERE = Here('n1', 'life-1', mine=False, leased=True, owner='n2', queue='q2')
MINE = replace(HERE, mine=True, owner='n1', queue='q1')
AWAY = replace(HERE, leased=False)
NOBODY = replace(HERE, owner=None, queue=None)
UNMATCHED = replace(NOBODY, unmatched=True)
RULES = Rules('shop_')
LATE = replace(DELIVERY, until=99.0)


def _wait(reason: str) -> Outcome:
    return Outcome(Action.WAIT, reason=reason)


def _parked(reason: str) -> Outcome:
    return Outcome(Action.SEND, 'jobs.jobsync.shop_.parked', 0, 'parked', reason)


_UNKNOWN = Outcome(Action.SEND, 'jobsync.shop_.unknown', 0, 'unknown', 'its task is not known here')

#: (what is so, the delivery, this node, the rules, what becomes of it)
TABLE: list[tuple[str, Received, Here, Rules, Outcome]] = [
    ('it is mine', DELIVERY, MINE, RULES, Outcome(Action.RUN)),
    ('mine after many hops', replace(DELIVERY, hops=99), MINE, RULES, Outcome(Action.RUN)),
    ('mine, of an unknown task', replace(DELIVERY, known=False), MINE, RULES, _UNKNOWN),
    ('no route', replace(DELIVERY, route=None), HERE, RULES, Outcome(Action.RUN)),
    ('no route, no lease', replace(DELIVERY, route=None), AWAY, RULES, _wait('no lease')),
    ('no route, no task', replace(DELIVERY, route=None, known=False), HERE, RULES, _UNKNOWN),
    (
        'its owner may know the task',
        replace(DELIVERY, known=False),
        HERE,
        RULES,
        Outcome(Action.SEND, 'q2', 1, 'forwarded', 'belongs to n2'),
    ),
    (
        "another's",
        DELIVERY,
        HERE,
        RULES,
        Outcome(Action.SEND, 'q2', 1, 'forwarded', 'belongs to n2'),
    ),
    (
        'the last hop',
        replace(DELIVERY, hops=3),
        HERE,
        RULES,
        Outcome(Action.SEND, 'q2', 4, 'forwarded', 'belongs to n2'),
    ),
    ('a hop too many', replace(DELIVERY, hops=4), HERE, RULES, _wait('4 hops')),
    ('that for long', replace(LATE, hops=5), HERE, RULES, _parked('5 hops')),
    ('nobody owns it', DELIVERY, NOBODY, RULES, _wait('no owner yet')),
    ('nobody for long', LATE, NOBODY, RULES, _parked('no owner yet')),
    (
        'the owner has no queue',
        DELIVERY,
        replace(HERE, queue=None),
        RULES,
        _wait('n2 takes no messages'),
    ),
    ('has none for long', LATE, replace(HERE, queue=None), RULES, _parked('n2 takes no messages')),
    ('mine by the map alone', DELIVERY, replace(MINE, mine=False), RULES, _wait('not here yet')),
    ('that for long', LATE, replace(MINE, mine=False), RULES, _parked('not here yet')),
    ('no lease', DELIVERY, replace(HERE, leased=False), RULES, _wait('no lease')),
    ('no lease for long', LATE, replace(HERE, leased=False), RULES, _wait('no lease')),
    (
        'of an earlier life',
        DELIVERY,
        replace(MINE, incarnation='life-2'),
        RULES,
        Outcome(Action.REQUEUE, event='returned', reason='of an earlier life'),
    ),
    (
        'of an earlier life and unknown',
        replace(DELIVERY, route=None, known=False),
        replace(MINE, incarnation='life-2'),
        RULES,
        Outcome(Action.REQUEUE, event='returned', reason='of an earlier life'),
    ),
    (
        'no key can be made',
        replace(DELIVERY, route=None, problem='no account'),
        MINE,
        RULES,
        Outcome(Action.DEAD_LETTER, reason='no account'),
    ),
    ('no node matches its pin', DELIVERY, UNMATCHED, RULES, _parked('no node matches its pin')),
    ('that without a lease', DELIVERY, replace(UNMATCHED, leased=False), RULES, _wait('no lease')),
    (
        'nobody consumes its queue',
        replace(DELIVERY, hops=3),
        replace(NOBODY, deserted=True),
        RULES,
        Outcome(Action.SEND, 'jobs', 0, 'sent_home', 'nobody consumes its queue'),
    ),
    (
        'that without a lease',
        DELIVERY,
        replace(NOBODY, deserted=True, leased=False),
        RULES,
        _wait('no lease'),
    ),
    (
        'all nodes got it',
        DELIVERY,
        HERE,
        replace(RULES, drop=True),
        Outcome(Action.DROP, event='dropped', reason='belongs to n2'),
    ),
    (
        'all got it, the owner has no queue',
        replace(LATE, hops=9),
        replace(HERE, queue=None),
        replace(RULES, drop=True),
        Outcome(Action.DROP, event='dropped', reason='belongs to n2'),
    ),
    (
        'all got it, nobody owns it',
        DELIVERY,
        NOBODY,
        replace(RULES, drop=True),
        _wait('no owner yet'),
    ),
]


@pytest.mark.parametrize(
    ('delivery', 'here', 'rules', 'outcome'),
    [row[1:] for row in TABLE],
    ids=[row[0] for row in TABLE],
)
def test_what_becomes_of_a_delivery(
    delivery: Received, here: Here, rules: Rules, outcome: Outcome
) -> None:
    assert place(delivery, here, rules, 100.0) == outcome


def every_case() -> list[tuple[Received, Here, Rules, float]]:
    """All that can be so."""
    deliveries = [
        Received('life-1', route, hops, 100.0, known, problem, 'jobs')
        for route, hops, known, problem in itertools.product(
            ('order-1', None), (0, 3, 4, 99), (True, False), ('', 'bad')
        )
    ]
    nodes = [
        Here('n1', life, mine, leased, owner, queue, unmatched, deserted)
        for life, mine, leased, owner, queue, unmatched, deserted in itertools.product(
            ('life-1', 'life-2'),
            (True, False),
            (True, False),
            ('n1', 'n2', None),
            ('q', None),
            (True, False),
            (True, False),
        )
    ]
    rules = [replace(RULES, drop=drop) for drop in (True, False)]
    return list(itertools.product(deliveries, nodes, rules, (99.0, 100.0)))


@pytest.mark.parametrize(
    ('name', 'holds'),
    [
        (
            'only what is mine, or nobody has to own, runs',
            lambda delivery, here, rules, outcome: (
                outcome.action is not Action.RUN
                or (here.mine or delivery.route is None)
                and delivery.known
                and not delivery.problem
                and delivery.incarnation == here.incarnation
            ),
        ),
        (
            'what is mine runs, whatever else is so',
            lambda delivery, here, rules, outcome: (
                outcome.action is Action.RUN
                or not here.mine
                or not delivery.known
                or bool(delivery.problem)
                or delivery.incarnation != here.incarnation
            ),
        ),
        (
            'what runs may begin, if the lease holds',
            lambda delivery, here, rules, outcome: (
                outcome.action is not Action.RUN or not here.leased or may_begin(delivery, here)
            ),
        ),
        (
            'what nobody has to own runs under a lease alone, and goes to no other node',
            lambda delivery, here, rules, outcome: (
                delivery.route is not None
                or (outcome.action is not Action.RUN or here.leased or here.mine)
                and outcome.event not in ('forwarded', 'parked', 'dropped')
            ),
        ),
        (
            'never to oneself',
            lambda delivery, here, rules, outcome: (
                outcome.event != 'forwarded' or here.owner not in (here.node, None)
            ),
        ),
        (
            'nothing is dropped that perhaps nobody else runs',
            lambda delivery, here, rules, outcome: (
                outcome.action is not Action.DROP
                or (rules.drop and here.leased and here.owner not in (here.node, None))
            ),
        ),
        (
            'what is sent has a queue, and a number of hops that is bounded',
            lambda delivery, here, rules, outcome: (
                (outcome.action is Action.SEND) == bool(outcome.queue)
                and outcome.hops <= rules.max_hops
            ),
        ),
        (
            'what no node matches waits in no memory',
            lambda delivery, here, rules, outcome: (
                not here.unmatched or not here.leased or outcome.action is not Action.WAIT
            ),
        ),
        (
            'without a lease nothing is sent that has an owner',
            lambda delivery, here, rules, outcome: (
                here.leased or outcome.event not in ('forwarded', 'parked', 'sent_home')
            ),
        ),
    ],
)
def test_whatever_is_so(name: str, holds: Any) -> None:
    assert [case for case in every_case() if not holds(*case[:3], place(*case))] == [], name


def test_the_last_look() -> None:
    assert may_begin(DELIVERY, MINE) and not may_begin(DELIVERY, HERE)
    free = replace(DELIVERY, route=None)
    assert may_begin(free, HERE) and not may_begin(free, replace(HERE, leased=False))
    for delivery in (DELIVERY, free):
        assert not may_begin(delivery, replace(MINE, incarnation='life-2'))
