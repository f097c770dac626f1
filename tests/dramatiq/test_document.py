"""The blocks of the Dramatiq chapter run as printed."""
from __future__ import annotations

import subprocess
import sys

from ..docs.blocks import ROOT, blocks_of


def test_each_python_block_runs() -> None:
    blocks = [block for block in blocks_of(ROOT / 'docs' / 'DRAMATIQ.md') if block.language == 'python']
    assert blocks
    for block in blocks:
        done = subprocess.run(
            [sys.executable, '-W', 'error', '-c', block.text + "\nassert charge.actor_name == 'charge'"], cwd=ROOT, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
        assert done.returncode == 0, done.stdout
