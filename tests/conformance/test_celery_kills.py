"""What Celery loses by itself: tasks that are classes, and members of chords that are counted after
their result is stored.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
from celery import chord

from .celery_adapter import CeleryAdapter
from .harness import Cluster
from .setups import Setup, setups

MakeCluster = Callable[..., Cluster]


@pytest.mark.parametrize('setup', setups('processes', framework='celery'), ids=str)
def test_a_killed_worker_loses_no_task_that_is_a_class(
    setup: Setup, make_cluster: MakeCluster
) -> None:
    cluster = make_cluster(setup)
    cluster.start('worker-1', 'worker-2', concurrency=2)
    mine = cluster.numbers('worker-1', 6, task='body')
    for n in mine:
        cluster.send('classy', n, 1.5)
    cluster.wait_started({f'b:{n}' for n in mine[:2]})
    cluster['worker-1'].crash()
    cluster.finish()


@pytest.mark.parametrize('tag', ['dies', 'dies with all'])
@pytest.mark.parametrize('setup', setups('processes', framework='celery'), ids=str)
def test_a_chord_completes_whose_member_was_killed_before_it_was_counted(
    setup: Setup, make_cluster: MakeCluster, tag: str
) -> None:
    cluster = make_cluster(setup)
    cluster.start('worker-1', 'worker-2', concurrency=2)
    adapter = cluster.adapter
    assert isinstance(adapter, CeleryAdapter)
    add, total = adapter.app.tasks['add'], adapter.app.tasks['total']
    result = chord(
        [add.s(1, number, tag=tag) for number in range(4)], total.s(tag=tag)
    ).apply_async()
    assert cluster.result(result.id, 60) == 4 + sum(range(4))
    assert len(cluster.ended(f't:{tag}')) == 1


@pytest.mark.parametrize('tag', ['dies', 'dies with all'])
@pytest.mark.parametrize(
    'setup', setups('processes', framework='celery', brokers=('redis',)), ids=str
)
def test_so_it_does_with_its_results_in_django_s_database(
    setup: Setup, make_cluster: MakeCluster, tag: str
) -> None:
    pytest.importorskip('django_celery_results', reason='django-celery-results is not installed')
    cluster = make_cluster(setup)
    database = cluster.adapter.order.database
    migrate = (
        'from sys import argv; from tests.conformance.celery_app import set_up_django; '
        'set_up_django(argv[1]); '
        'from django.core.management import call_command; call_command("migrate", verbosity=0)'
    )
    subprocess.run([sys.executable, '-c', migrate, database], check=True, timeout=60)
    cluster.start('worker-1', 'worker-2', concurrency=2, results='django-db')
    cluster.adapter.send('add_up', [tag, 4])
    cluster.wait_ended([f't:{tag}'], 60)
    assert len(cluster.ended(f't:{tag}')) == 1
    assert sorted(note.key for note in cluster.notes.of('end') if note.key.startswith('a:')) == [
        f'a:{tag}:1:{n}' for n in range(4)
    ]


@pytest.mark.parametrize('setup', setups('processes', framework='celery'), ids=str)
def test_a_message_without_a_key_fails_at_once_and_fails_its_chord(
    setup: Setup, make_cluster: MakeCluster
) -> None:
    cluster = make_cluster(setup)
    cluster.start('worker-1', concurrency=2)
    adapter = cluster.adapter
    assert isinstance(adapter, CeleryAdapter)
    add, total = adapter.app.tasks['add'], adapter.app.tasks['total']
    lost = add.s(2, 2).set(task_id='no tag')  # its tag is empty
    result = chord([add.s(1, 1, tag='keyless'), lost], total.s(tag='keyless')).apply_async()
    assert (
        cluster.outcome('no tag').state == 'failed'
        and type(cluster.outcome('no tag').value).__name__ == 'Unroutable'
    )
    assert cluster.outcome(result.id).state == 'failed'
    assert cluster.ended('a::2:2', 't:keyless') == []
    cluster.finish()
