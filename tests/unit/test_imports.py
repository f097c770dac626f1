"""Imports point one way, pure modules stay pure, and importing the package costs nothing but
psycopg2.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Sequence, Set
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CORE = ROOT / 'jobsync_core'

#: Folders, and modules that stand beside them, that do no I/O and read no clock.
PURE = frozenset(
    {
        'assignment',
        'belonging',
        'config',
        'database_url',
        'environment',
        'errors',
        'logs',
        'protocol',
        'results',
        'secret',
        'task',
    }
)
#: From the bottom to the top: a module imports from its own folder and from the layers below, from
#: no neighbour.
LAYERS = (
    {'errors'},
    {'belonging', 'clock', 'database_url', 'logs', 'process', 'results', 'secret', 'task'},
    {'assignment', 'environment'},
    {'config'},
    {'protocol'},
    {'store'},
    {'agent', 'ledger'},
    {'executions', 'node'},
    {'job'},
    {'metrics'},
    {'web'},
    {'worker'},
    {'embedded'},
    {'testing'},
    {''},
    {'cli'},
)
#: The same for the adapters: a folder, or a module beside it.
CELERY_LAYERS = (
    {'faults', 'logs', 'signals'},
    {'incoming', 'parts', 'settings'},
    {'broker'},
    {'redis'},
    {'tasks'},
    {'application'},
    {
        'beat',
        'children',
        'cold_shutdown',
        'configuring',
        'entering',
        'gate',
        'loop_watch',
        'outlasted',
        'producer',
        'worker_checks',
    },
    {'consuming', 'home_queues'},
    {'hooks'},
    {'control', 'steps'},
    {'plugin'},
    {''},
    {'commands'},
)
DRAMATIQ_LAYERS = (
    {'errors', 'incoming', 'parts', 'process'},
    {'broker', 'groups'},
    {'notes'},
    {'once'},
    {'actors'},
    {'gate', 'producer', 'receiving'},
    {'consumer', 'hooks'},
    {'node'},
    {'middleware'},
    {''},
)
#: What reads a clock, waits, or talks to anything outside of the process.
IMPURE = {
    'asyncio',
    'multiprocessing',
    'pathlib',
    'psycopg2',
    'random',
    'select',
    'shutil',
    'signal',
    'socket',
    'subprocess',
    'threading',
    'time',
    'urllib.request',
}
STATEMENTS = (
    'SELECT ',
    'INSERT INTO',
    'UPDATE ',
    'DELETE FROM',
    'CREATE TABLE',
    'LISTEN ',
    'NOTIFY ',
)
MODULES = sorted(CORE.rglob('*.py'))


def part_of(path: Path) -> str:
    """First name below the package; '' for the package itself."""
    first = path.relative_to(ROOT).parts[1]
    return first.removesuffix('.py') if first != '__init__.py' else ''


def layer_of(part: str, layers: Sequence[Set[str]] = LAYERS) -> int:
    found = [number for number, layer in enumerate(layers) if part in layer]
    assert found, f'{part} has no place among the layers'
    return found[0]


def module_of(path: Path) -> str:
    return '.'.join(path.relative_to(ROOT).with_suffix('').parts).removesuffix('.__init__')


def imports_of(path: Path) -> set[str]:
    """Modules of its own package that a module imports, for type checkers too."""
    package = path.relative_to(ROOT).parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        names: list[tuple[str, ...]] = []
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = (*base, *(node.module or '').split('.')) if node.module else base
            names = [(*module, alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [tuple(alias.name.split('.')) for alias in node.names]
        for name in names:
            if name[0] == package[0]:
                known = [
                    name[:length] for length in range(len(name), 0, -1) if _is_module(name[:length])
                ]
                found.add('.'.join(known[0]))
    return found


def _is_module(name: tuple[str, ...]) -> bool:
    place = ROOT.joinpath(*name)
    return place.is_dir() or place.with_suffix('.py').exists()


def inner_imports(path: Path) -> set[str]:
    """First names below the package of what a module imports."""
    return {name.split('.')[1] if '.' in name else '' for name in imports_of(path)}


def outer_imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            found |= {node.module, node.module.partition('.')[0]}
    return found


def upward_imports(path: Path, layers: Sequence[Set[str]]) -> set[tuple[str, str]]:
    part = part_of(path)
    return {
        (part, other)
        for other in inner_imports(path)
        if other != part and layer_of(other, layers) >= layer_of(part, layers)
    }


@pytest.mark.parametrize('path', MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_downwards(path: Path) -> None:
    assert not upward_imports(path, LAYERS)


@pytest.mark.parametrize(
    ('package', 'layers'),
    [('jobsync_celery', CELERY_LAYERS), ('jobsync_dramatiq', DRAMATIQ_LAYERS)],
)
def test_the_adapters_imports_point_downwards(package: str, layers: Sequence[Set[str]]) -> None:
    found = {path: upward_imports(path, layers) for path in (ROOT / package).rglob('*.py')}
    assert {path: each for path, each in found.items() if each} == {}


@pytest.mark.parametrize('package', ['jobsync_core', 'jobsync_celery', 'jobsync_dramatiq'])
def test_no_module_imports_itself_by_way_of_others(package: str) -> None:
    """Not for type checkers either: a circle that only types go round is one for the reader all the
    same.
    """
    left = {module_of(path): imports_of(path) for path in (ROOT / package).rglob('*.py')}
    while ends := [
        name
        for name, others in left.items()
        if not others & left.keys() - {name}
        or not any(name in left[other] for other in left if other != name)
    ]:
        for name in ends:
            del left[name]
    assert not left, 'each of these imports another of them: ' + ', '.join(sorted(left))


def test_pure_modules_do_no_io_and_read_no_clock() -> None:
    for path in MODULES:
        if part_of(path) in PURE:
            assert not outer_imports(path) & IMPURE, path


def test_sql_stays_in_the_store() -> None:
    for path in MODULES:
        if part_of(path) == 'store':
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                text = node.value.lstrip()
                assert not text.startswith(STATEMENTS), f'{path.name}:{node.lineno}'


def test_only_the_store_imports_psycopg2_but_for_types() -> None:
    found = set()
    for package in ('jobsync_core', 'jobsync_celery', 'jobsync_dramatiq'):
        for path in (ROOT / package).rglob('*.py'):
            tree = ast.parse(path.read_text(encoding='utf-8'))
            for_types = {
                id(each)
                for node in ast.walk(tree)
                if isinstance(node, ast.If) and ast.unparse(node.test) == 'TYPE_CHECKING'
                for each in ast.walk(node)
            }
            names = {
                name
                for node in ast.walk(tree)
                if id(node) not in for_types
                for name in (
                    [alias.name for alias in node.names]
                    if isinstance(node, ast.Import)
                    else [node.module or '']
                    if isinstance(node, ast.ImportFrom) and not node.level
                    else []
                )
            }
            if {name.partition('.')[0] for name in names} & {'psycopg2'}:
                found.add(str(path.relative_to(ROOT)))
    assert {name for name in found if not name.startswith('jobsync_core/store/')} == set()


def test_every_module_says_what_is_public() -> None:
    silent = [
        path
        for path in MODULES
        if '__all__' not in path.read_text(encoding='utf-8') and path.name != '__main__.py'
    ]
    assert [path for path in silent if path.read_text(encoding='utf-8').count('\n') > 3] == []


def test_the_short_name_has_the_same_public_names() -> None:
    import jobsync
    import jobsync_core

    assert jobsync.__all__ == jobsync_core.__all__
    assert jobsync.__version__ == jobsync_core.__version__
    assert all(getattr(jobsync, name) is getattr(jobsync_core, name) for name in jobsync.__all__)


def test_the_adapters_do_not_know_each_other() -> None:
    for package, other in (
        ('jobsync_celery', 'jobsync_dramatiq'),
        ('jobsync_dramatiq', 'jobsync_celery'),
    ):
        for path in (ROOT / package).rglob('*.py'):
            assert other not in outer_imports(path), path


def test_the_import_loads_nothing_but_psycopg2_and_the_standard_library() -> None:
    program = (
        'import sys, threading\n'
        'before = set(sys.modules)\n'
        'import jobsync_core\n'
        "loaded = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(*sorted(loaded - set(sys.stdlib_module_names) - {'jobsync_core', 'psycopg2'}), "
        'threading.active_count())\n'
    )
    done = subprocess.run(
        [sys.executable, '-W', 'error', '-c', program],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout.split()) == (0, ['1'])


@pytest.mark.parametrize(
    ('module', 'lacking', 'extra'),
    [
        ('jobsync_celery', ('celery', 'click'), 'celery'),
        ('jobsync_celery', ('click',), 'celery'),
        ('jobsync_celery.beat', ('celery',), 'celery'),
        ('jobsync_dramatiq', ('dramatiq',), 'dramatiq'),
        ('jobsync_core.metrics', ('prometheus_client',), 'metrics'),
    ],
)
def test_what_needs_an_extra_names_it(module: str, lacking: Sequence[str], extra: str) -> None:
    program = (
        'import sys\n'
        'class Finder:\n'
        '    def find_spec(name, path=None, target=None):\n'
        f'        if name in {lacking!r}:\n'
        '            raise ModuleNotFoundError(name=name)\n'
        'sys.meta_path.insert(0, Finder)\n'
        f'import {module}\n'
    )
    done = subprocess.run(
        [sys.executable, '-c', program],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.stdout.splitlines()[-1] == (
        f'ModuleNotFoundError: {module.removesuffix(".beat")}: {lacking[0]} is missing; '
        f"install it with: pip install 'jobsync-workers[{extra}]'"
    )


def test_the_layers_are_those_of_the_documentation() -> None:
    text = (ROOT / 'docs' / 'ARCHITECTURE.md').read_text(encoding='utf-8')
    rows = text.partition('| layer |')[2].partition('\n\n')[0].splitlines()[2:]
    named = [set(re.findall('`([^`]+)`', row.split('|')[1])) for row in rows]
    assert named == [{part or 'jobsync_core' for part in layer} for layer in LAYERS]


def test_what_the_documentation_says_where_it_is_is_there() -> None:
    text = (ROOT / 'docs' / 'ARCHITECTURE.md').read_text(encoding='utf-8')
    named = re.findall(r'`((?:[a-z_]+/)+[a-z_]+\.(?:py|sql))`', text)
    assert len(named) > 30
    assert [
        name for name in named if not (ROOT / name).exists() and not (CORE / name).exists()
    ] == []
