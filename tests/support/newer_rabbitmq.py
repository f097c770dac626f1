"""A RabbitMQ that is newer than the machine's own, with its Erlang and its C library, in a folder
of the tree: `python -m tests.support.newer_rabbitmq` puts it there, from Debian 13's packages.

Nothing of it is installed in the system: the packages are unpacked, and each program of Erlang is
started by the loader that came with it. That takes seconds and needs no rights, but `apt-get` and
`dpkg-deb`; where they are missing, tests that need it are skipped. On a machine whose own RabbitMQ
is new enough, that is taken.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from .brokers import BrokerUnavailable, RabbitProgram, rabbit_program

__all__ = ['install', 'newer_rabbitmq']

_LEAST = (3, 12)
_PLACE = Path(__file__).resolve().parents[2] / '.rabbitmq-newer'
_SUITE = 'trixie'
_KEYS = Path('/usr/share/keyrings/debian-archive-keyring.gpg')
_ERLANG = (
    'base crypto eldap inets mnesia os-mon parsetools public-key runtime-tools ssl syntax-tools '
    'tools xmerl asn1'
)
_LIBRARIES = 'libc6 libgcc-s1 libstdc++6 libtinfo6 libssl3t64 zlib1g libzstd1 libsystemd0'
_PACKAGES = (
    'rabbitmq-server',
    *(f'erlang-{name}' for name in _ERLANG.split()),
    *_LIBRARIES.split(),
)


def newer_rabbitmq() -> RabbitProgram:
    """A RabbitMQ of version 3.12 or later.

    Raises:
        BrokerUnavailable: There is none.
    """
    if (_PLACE / 'bin' / 'erl').exists():
        return RabbitProgram(str(_PLACE / 'usr/lib/rabbitmq/bin/rabbitmq-server'), _PLACE / 'bin')
    own = rabbit_program()
    if _version(Path(own.script)) >= _LEAST:
        return own
    raise BrokerUnavailable(
        f'rabbitmq-server is older than {".".join(map(str, _LEAST))}, and none is in {_PLACE}: '
        'python -m tests.support.newer_rabbitmq puts one there'
    )


def install() -> None:
    """Put one into the tree, unless it is there.

    Raises:
        CalledProcessError: A package cannot be had.
    """
    if (_PLACE / 'bin' / 'erl').exists():
        return
    # Beside its place, to be moved there whole.
    with tempfile.TemporaryDirectory(dir=_PLACE.parent, prefix='.rabbitmq-') as made:
        packages, root = Path(made, 'packages'), Path(made, 'root')
        packages.mkdir()
        _download(packages)
        for package in sorted(packages.glob('*.deb')):
            subprocess.run(['dpkg-deb', '--extract', package, root], check=True)
        for each in ('etc', 'usr/share'):
            shutil.rmtree(root / each)
        _bring_loader(root)
        shutil.rmtree(_PLACE, ignore_errors=True)
        root.rename(_PLACE)


def _download(folder: Path) -> None:
    """Have apt fetch the packages, with a state of its own."""
    state = folder / 'apt'
    for each in ('lists/partial', 'cache/archives/partial'):
        (state / each).mkdir(parents=True)
    (state / 'status').touch()
    (state / 'sources').write_text(
        f'deb [signed-by={_KEYS}] http://deb.debian.org/debian {_SUITE} main\n'
    )
    options = {
        'Dir::Etc::sourcelist': state / 'sources',
        'Dir::Etc::sourceparts': '/dev/null',
        'Dir::State': state,
        'Dir::State::status': state / 'status',
        'Dir::Cache': state / 'cache',
        'Acquire::Languages': 'none',
        'Acquire::Retries': '3',
        'APT::Sandbox::User': '',
    }
    command = ['apt-get', '-qq', *(f'-o{name}={value}' for name, value in options.items())]
    subprocess.run([*command, 'update'], check=True)
    subprocess.run([*command, 'download', *_PACKAGES], check=True, cwd=folder)


def _bring_loader(root: Path) -> None:
    """Have each program of Erlang started with the libraries that were made for it."""
    libraries = next(root.glob('usr/lib/*-linux-gnu*'))
    loader = next(libraries.glob('ld-linux*.so*'))
    erlang = root / 'usr/lib/erlang'
    for folder in (*erlang.glob('erts-*/bin'), *erlang.glob('lib/*/priv/bin'), erlang / 'bin'):
        there = f'${{0%/*}}/{os.path.relpath(libraries, folder)}'
        for program in sorted(folder.iterdir()):
            if program.is_symlink() or not program.read_bytes().startswith(b'\x7fELF'):
                continue
            program.rename(program.with_suffix('.real'))
            _script(
                program,
                f'exec "{there}/{loader.name}" --library-path "{there}" --argv0 "$0" '
                f'"${{0%/*}}/{program.with_suffix(".real").name}" "$@"',
            )
    runtime = next(erlang.glob('erts-*'))
    for start, up in ((runtime / 'bin' / 'erl', '/erts-*'), (erlang / 'bin' / 'erl', '/bin/*')):
        _script(
            start,
            f'export EMU=beam PROGNAME=erl ROOTDIR="${{0%{up}}}"',
            f'export BINDIR="$ROOTDIR/{runtime.name}/bin"',
            'exec "$BINDIR/erlexec" "$@"',
        )
    (root / 'bin').mkdir()
    for name in ('erl', 'epmd', 'escript'):
        there = f'${{0%/bin/*}}/usr/lib/erlang/{runtime.name}/bin'
        _script(root / 'bin' / name, f'exec "{there}/{name}" "$@"')


def _script(path: Path, *lines: str) -> None:
    path.write_text('\n'.join(('#!/bin/sh', *lines, '')))
    path.chmod(0o755)


def _version(script: Path) -> tuple[int, ...]:
    """The version of an installed RabbitMQ, by the name of its directory; () where that is not
    told.
    """
    found = re.search(r'rabbitmq_server-([0-9.]+)', str(script.resolve()))
    return tuple(int(part) for part in found[1].split('.')) if found else ()


if __name__ == '__main__':
    try:
        install()
    except (OSError, subprocess.CalledProcessError) as problem:
        sys.exit(f'no newer RabbitMQ: {problem}')
    print(newer_rabbitmq().script)
