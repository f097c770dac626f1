"""A project on disk, for a document whose blocks are files, scripts that use them, and commands
that run them.
"""

from __future__ import annotations

import re
from pathlib import Path

from jobsync_core import CoordinationConfig
from tests.support.brokers import BrokerServer, free_port

from ..celery.programs import Programs
from .blocks import ROOT, Block, blocks_of

__all__ = ['Project']

_FILE = re.compile(r'# ([\w/]+\.py)(?:, continued)?\n')
#: What a command prints when it is at work; all other commands end by themselves.
_READY = {
    ' worker ': ' ready.',
    ' beat ': ' is starting',
    'dramatiq proj': 'ready for action.',
    'dramatiq rabbit': 'ready for action.',
}


class Project:
    """Runs the blocks of one document.

    A block that begins with a file's name is a part of that file, and the whole file is there from
    the start. Where the file is one of the repository's, the block must be a part of it, word for
    word. Any other Python block is a script of its own.

    Args:
        path: The document.
        config: The database.
        broker: The broker's server.
        directory: Where the project is made.
    """

    def __init__(
        self, path: Path, config: CoordinationConfig, broker: BrokerServer, directory: Path
    ) -> None:
        self.printed: list[str] = []
        place = directory / 'project'
        place.mkdir()
        self.programs = Programs(config, broker, place, directory)
        # Another process may have the port that the document names.
        self._port = str(free_port())
        parts: dict[str, str] = {}
        for block in blocks_of(path):
            name = _file(block)
            if name is not None and not (ROOT / name).exists():
                parts[name] = f'{parts[name]}\n\n{block.text}' if name in parts else block.text
        for name, text in parts.items():
            (place / name).write_text(text, encoding='utf-8')

    def run(self, block: Block) -> None:
        """Run one block."""
        if block.language == 'sh':
            self._shell(block)
            return
        assert block.language == 'python', block
        name = _file(block)
        if name is None:
            (self.programs.place / 'script.py').write_text(block.text, encoding='utf-8')
            self.printed.append(self.programs.run('python script.py'))
        elif (ROOT / name).exists():
            assert block.text.partition('\n')[2] in (ROOT / name).read_text(encoding='utf-8'), (
                f'{block} is not in {name} any more'
            )
        else:
            self.programs.run(f"python -c 'import {name.removesuffix('.py')}'")

    def close(self) -> None:
        """End all that runs."""
        self.programs.close()

    def _shell(self, block: Block) -> None:
        script = ''
        for line in block.text.replace('8080', self._port).splitlines():
            ready = next((text for command, text in _READY.items() if command in line), None)
            if ready is None:
                script += f'{line}\n'
            else:
                self.programs.start(line, ready)
        if script:
            self.printed.append(self.programs.run(script))


def _file(block: Block) -> str | None:
    found = _FILE.match(block.text) if block.language == 'python' else None
    return found[1] if found else None
