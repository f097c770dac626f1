"""Statements stand once, named and described, in files that come with the package."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import jobsync_core.store
from jobsync_core.store.layout import MIGRATIONS
from jobsync_core.store.location import PINNED_PATH
from jobsync_core.store.statements import catalog, parse, read_migration
from jobsync_core.store.tables import FUNCTIONS, Tables

STORE = Path(jobsync_core.store.__file__).parent
NAMES = sorted(catalog().statements)


def named_in_code() -> set[str]:
    """What looks like the name of a statement, in all modules of the store."""
    subjects = {name.partition('.')[0] for name in NAMES}
    return {
        node.value
        for path in STORE.glob('*.py')
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8')))
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and node.value.partition('.')[0] in subjects
        and node.value.partition('.')[2].isidentifier()
    }


def test_every_statement_is_used_and_every_used_one_is_there() -> None:
    assert named_in_code() == set(NAMES)


def test_every_piece_is_used() -> None:
    found = catalog()
    used = {
        name for each in (*found.statements.values(), *found.pieces.values()) for name in each.names
    }
    assert used >= set(found.pieces)


@pytest.mark.parametrize('name', NAMES)
def test_a_statement_is_filled_in_wholly(name: str) -> None:
    text = Tables('shop_', 'my"place').sql(name)
    assert text and '--' not in text
    assert '{' not in text and not text.endswith(';')


def test_a_percent_sign_is_meant_as_it_stands_and_parameters_are_parameters() -> None:
    found = parse(
        '-- name: each\n-- Some.\nSELECT %(one)s, %s, 7 % 2, 7 %2 FROM {node}', 'test'
    ).render('test.each', {'node': '"100%"'}, {})
    assert found == 'SELECT %(one)s, %s, 7 %% 2, 7 %%2 FROM "100%%"'


def test_a_piece_is_filled_in_and_may_be_replaced() -> None:
    found = parse(
        '-- piece: old\n-- Too old.\nage > 7\n\n-- name: all\n-- All.\n'
        'SELECT FROM {node}\n    -- but not all\nWHERE {old};\n',
        'test',
    )
    names = {'node': 'n'}
    assert found.render('test.all', names, {}) == 'SELECT FROM n\nWHERE age > 7'
    assert found.render('test.all', names, {'old': 'true'}) == 'SELECT FROM n\nWHERE true'
    with pytest.raises(KeyError):
        found.render('test.all', names, {'young': 'true'})
    with pytest.raises(KeyError):
        found.render('test.none', names, {})


@pytest.mark.parametrize(
    ('text', 'said'),
    [
        ('SELECT 1\n-- name: a\n-- A.\nSELECT 2', 'before the first name'),
        ('-- name: a\nSELECT 2', 'a has no description'),
        ('-- name: a\n-- A.\n', 'a has no description, or no text'),
        ('-- name: a\n-- A.\nSELECT 1\n\n-- name: a\n-- A.\nSELECT 2', 'a stands twice'),
    ],
)
def test_a_file_that_is_not_as_it_should_be_is_refused(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse(text, 'test')


def test_a_statement_is_put_together_once() -> None:
    tables = Tables('shop_')
    assert tables.sql('queue.known') is tables.sql('queue.known')


def test_the_pinned_path_is_the_same_in_the_statements() -> None:
    assert catalog().pieces['pinned_path'].text == PINNED_PATH


def test_every_file_of_migrations_and_functions_is_used() -> None:
    texts = {migration.name: read_migration(migration.name) for migration in MIGRATIONS}
    assert {path.stem for path in (STORE / 'migrations').iterdir()} == set(texts)
    for path in (STORE / 'functions').iterdir():
        assert sum(f'{{{path.stem}}}' in text for text in texts.values()) == 1, path.name


_HEAD = re.compile(
    r'CREATE OR REPLACE FUNCTION (\{[a-z_]+\}) ?(\(.*?\))\s*RETURNS (.*?)\s*LANGUAGE', re.S
)


def test_a_function_keeps_its_name_only_while_processes_of_earlier_versions_may_call_it() -> None:
    """They call it by its name, while this version's have put theirs in its place: what takes or
    gives something else needs another name.
    """
    heads: dict[str, set[tuple[str, ...]]] = {}
    for path in (STORE / 'functions').iterdir():
        name, *head = _HEAD.findall(path.read_text(encoding='utf-8'))[0]
        heads.setdefault(name, set()).add(tuple(' '.join(part.split()) for part in head))
    assert {name.strip('{}') for name in heads} == set(FUNCTIONS)
    assert [name for name, found in heads.items() if len(found) > 1] == []
