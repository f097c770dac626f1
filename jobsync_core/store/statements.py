"""The statements: each stands once, named and described, in a file of `queries/`, by subject.

A file looks like this. Names in braces are tables, functions and pieces; `%(name)s` and `%s` are
parameters, and any other `%` is meant as it stands.

    -- name: owner
    -- The node that the database names for a token.
    SELECT node FROM {assignment} WHERE tokens @> %(token)s::int

A piece (`-- piece: counts`) is what several statements have in common. The files are data of the
package and are read once, by whoever needs the first statement.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

__all__ = ['Catalog', 'Statement', 'catalog', 'fill', 'parse', 'read_function', 'read_migration']

#: The wheel is installed as files. `importlib.resources` would read from an archive as well, and
#: costs each process 1 MB more.
_PLACE = Path(__file__).parent

_HEADER = re.compile(r'-- (name|piece): ([a-z_]+)\n')
_NAME = re.compile(r'\{([a-z_0-9]+)\}')
_LITERAL_PERCENT = re.compile(r'%(?!s\b|\([a-z_]+\)s)')


@dataclass(frozen=True)
class Statement:
    """One statement, or several that are sent in one string, before the tables are known.

    Args:
        text: Without comments.
        description: What it does, for readers.
        names: The names in braces.
    """

    text: str
    description: str
    names: frozenset[str]


@dataclass(frozen=True)
class Catalog:
    """All statements, by `subject.name`, and the pieces by their name."""

    statements: Mapping[str, Statement]
    pieces: Mapping[str, Statement]

    def render(self, name: str, names: Mapping[str, str], pieces: Mapping[str, str]) -> str:
        """A statement for one cluster's tables.

        Args:
            name: `subject.name`.
            names: Tables and functions, for SQL.
            pieces: Text that takes the place of pieces, for this time.

        Raises:
            KeyError: There is no such statement, or none of these is a piece.
        """
        for piece in pieces:
            self.pieces[piece]
        return self._fill(self.statements[name].text, names, pieces)

    def _fill(self, text: str, names: Mapping[str, str], pieces: Mapping[str, str]) -> str:
        def named(found: re.Match[str]) -> str:
            name = found[1]
            if name in names:
                return names[name].replace('%', '%%')
            if name in pieces:
                return pieces[name]
            return self._fill(self.pieces[name].text, names, pieces)

        return _NAME.sub(named, text)


def parse(text: str, subject: str) -> Catalog:
    """The statements and pieces of one file.

    Raises:
        ValueError: One has no description or no text, or its name is taken.
    """
    head, *rest = _HEADER.split(text)
    if any(line and not line.startswith('--') for line in head.splitlines()):
        raise ValueError(f'{subject}.sql: there is SQL before the first name')
    found: dict[str, dict[str, Statement]] = {'name': {}, 'piece': {}}
    for kind, name, body in zip(rest[::3], rest[1::3], rest[2::3], strict=True):
        key = f'{subject}.{name}' if kind == 'name' else name
        statement = _statement(body)
        if not statement.description or not statement.text:
            raise ValueError(f'{subject}.sql: {name} has no description, or no text')
        if key in found[kind]:
            raise ValueError(f'{subject}.sql: {name} stands twice')
        found[kind][key] = statement
    return Catalog(found['name'], found['piece'])


def _statement(body: str) -> Statement:
    lines = body.strip().splitlines()
    comments = [line.strip() for line in lines if line.lstrip().startswith('--')]
    first = next(
        (place for place, line in enumerate(lines) if not line.startswith('--')), len(lines)
    )
    text = '\n'.join(line for line in lines if not line.lstrip().startswith('--'))
    text = _LITERAL_PERCENT.sub('%%', text.strip().rstrip(';'))
    description = ' '.join(line.removeprefix('--').strip() for line in comments[:first])
    return Statement(text, description, frozenset(_NAME.findall(text)))


@lru_cache(maxsize=1)
def catalog() -> Catalog:
    """All files of `queries/`.

    Raises:
        ValueError: A file is not as it should be, or two pieces have one name.
    """
    statements: dict[str, Statement] = {}
    pieces: dict[str, Statement] = {}
    for file in sorted(_PLACE.joinpath('queries').glob('*.sql')):
        found = parse(file.read_text(encoding='utf-8'), file.stem)
        if twice := found.pieces.keys() & pieces.keys():
            raise ValueError(f'{file.name}: {", ".join(sorted(twice))} stands twice')
        statements.update(found.statements)
        pieces.update(found.pieces)
    return Catalog(statements, pieces)


def read_migration(name: str) -> str:
    """The text of a migration, for `fill`."""
    return _PLACE.joinpath('migrations', f'{name}.sql').read_text(encoding='utf-8')


def read_function(name: str) -> str:
    """The text of a database function, by its name with the version."""
    return _PLACE.joinpath('functions', f'{name}.sql').read_text(encoding='utf-8')


def fill(text: str, names: Mapping[str, str]) -> str:
    """A migration with its names filled in; what is no table stands for a function's text.

    Raises:
        FileNotFoundError: There is neither.
    """

    def named(found: re.Match[str]) -> str:
        name = found[1]
        return names[name] if name in names else fill(read_function(name).rstrip('\n'), names)

    return _NAME.sub(named, text)
