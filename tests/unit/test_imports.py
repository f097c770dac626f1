"""Imports point one way, pure modules stay pure, and importing the package costs nothing but psycopg2."""
from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CORE = ROOT / 'jobsync_core'

PURE = frozenset({
    'arguments', 'belonging', 'claims', 'config', 'database_url', 'effects', 'errors', 'exclusions', 'hashing', 'leader', 'liveness',
    'logs', 'lookout', 'messages', 'misspelt', 'patterns', 'pausing', 'planner', 'protocol', 'results', 'rhythm', 'secret', 'simulate',
    'stable', 'takings', 'task', 'tokens'})
#: From the bottom to the top: a module imports from its own layer and from those below. Packages count with all of their modules.
LAYERS = (
    PURE, {'clock', 'process'}, {'store'},
    {'agent', 'attempt', 'binding', 'callbacks', 'current_ledger', 'execution', 'group_commit', 'housekeeper', 'keys', 'ledger',
     'ledger_calls', 'once', 'owners', 'routing', 'taskbook', 'transaction', 'unsettled'},
    {'incoming'}, {'job'}, {'plugin'}, {'mail'}, {'passage'}, {'evacuation', 'parking', 'rescue'}, {'adapter', 'consuming', 'keeper'},
    {'', 'cli', 'embedded', 'embedded_process', 'embedded_redis', 'embedded_supervisor', 'metrics', 'testing', 'web'})
#: What reads a clock, waits, or talks to anything outside of the process.
IMPURE = {
    'asyncio', 'multiprocessing', 'pathlib', 'psycopg2', 'random', 'select', 'shutil', 'signal', 'socket', 'subprocess', 'threading',
    'time', 'urllib.request'}
STATEMENTS = ('SELECT ', 'INSERT INTO', 'UPDATE ', 'DELETE FROM', 'CREATE TABLE', 'LISTEN ', 'NOTIFY ')
MODULES = sorted(CORE.rglob('*.py'))


def part_of(path: Path) -> str:
    """First name below the package; '' for the package itself."""
    first = path.relative_to(CORE).parts[0]
    return first.removesuffix('.py') if first != '__init__.py' else ''


def layer_of(part: str) -> int:
    found = [number for number, layer in enumerate(LAYERS) if part in layer]
    assert found, f'jobsync_core.{part} has no place in LAYERS'
    return found[0]


def inner_imports(path: Path) -> set[str]:
    """Parts of the package that a module imports, other than for type checkers."""
    package = ('jobsync_core', *path.relative_to(CORE).parts[:-1])
    found = set()
    for node in _run_time(ast.parse(path.read_text(encoding='utf-8'))):
        names: list[tuple[str, ...]] = []
        if isinstance(node, ast.ImportFrom):
            base = package[:len(package) - node.level + 1] if node.level else ()
            module = (*base, *(node.module or '').split('.')) if node.module else base
            names = [(*module, alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [tuple(alias.name.split('.')) for alias in node.names]
        for name in names:
            if name[0] == 'jobsync_core':
                first = name[1] if len(name) > 1 else ''
                found.add(first if (CORE / first).is_dir() or (CORE / f'{first}.py').exists() else '')
    return found


def _run_time(tree: ast.AST) -> list[ast.AST]:
    found = []
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and ast.unparse(node.test) == 'TYPE_CHECKING'):
            found += [node, *_run_time(node)]
    return found


def outer_imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            found |= {node.module, node.module.partition('.')[0]}
    return found


@pytest.mark.parametrize('path', MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_downwards(path: Path) -> None:
    part = part_of(path)
    upwards = {(part, other) for other in inner_imports(path) if other != part and layer_of(other) > layer_of(part)}
    assert not upwards


def test_pure_modules_do_no_io_and_read_no_clock() -> None:
    for part in PURE:
        assert not outer_imports(CORE / f'{part}.py') & IMPURE, part


def test_sql_stays_in_the_store() -> None:
    for path in MODULES:
        if part_of(path) == 'store':
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                text = node.value.lstrip()
                assert not text.startswith(STATEMENTS), f'{path.name}:{node.lineno}'


def test_every_module_says_what_is_public() -> None:
    silent = [path for path in MODULES if '__all__' not in path.read_text(encoding='utf-8') and path.name != '__main__.py']
    assert [path for path in silent if path.read_text(encoding='utf-8').count('\n') > 3] == []


def test_the_short_name_has_the_same_public_names() -> None:
    import jobsync
    import jobsync_core

    assert jobsync.__all__ == jobsync_core.__all__
    assert jobsync.__version__ == jobsync_core.__version__
    assert all(getattr(jobsync, name) is getattr(jobsync_core, name) for name in jobsync.__all__)


def test_the_adapters_do_not_know_each_other() -> None:
    for package, other in (('jobsync_celery', 'jobsync_dramatiq'), ('jobsync_dramatiq', 'jobsync_celery')):
        for path in (ROOT / package).rglob('*.py'):
            assert other not in outer_imports(path), path


def test_the_import_loads_nothing_but_psycopg2_and_the_standard_library() -> None:
    program = (
        'import sys, threading\n'
        'before = set(sys.modules)\n'
        'import jobsync_core\n'
        "loaded = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(*sorted(loaded - set(sys.stdlib_module_names) - {'jobsync_core', 'psycopg2'}), threading.active_count())\n")
    done = subprocess.run(
        [sys.executable, '-W', 'error', '-c', program], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert (done.returncode, done.stdout.split()) == (0, ['1'])
