"""Finds the code blocks of Markdown files and the statements of SQL files."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

__all__ = ['ROOT', 'Block', 'blocks_of', 'statements_of']

ROOT = Path(__file__).parents[2]
_FENCE = re.compile(r'^```(\w*)\n(.*?)^```$', re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Args:
        path: The file.
        line: Line of its first statement.
        language: What follows the fence.
        text: The code.
    """

    path: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f'{self.path.name}:{self.line}'


def blocks_of(path: Path) -> list[Block]:
    """The fenced blocks of a Markdown file, in order."""
    text = path.read_text(encoding='utf-8')
    return [
        Block(path, text.count('\n', 0, match.start()) + 2, match[1], match[2])
        for match in _FENCE.finditer(text)
    ]


def statements_of(path: Path) -> list[tuple[str, str]]:
    """The statements of an SQL file, each with the comment above it."""
    found, comment, statement = [], '', ''
    for line in path.read_text(encoding='utf-8').splitlines(keepends=True):
        if not statement and line.startswith('--'):
            comment = line.removeprefix('-- ').strip()
        elif line.strip():
            statement += line
            if line.rstrip().endswith(';'):
                found.append((comment, statement))
                statement = ''
    assert not statement, f'{path.name} ends within a statement'
    return found
