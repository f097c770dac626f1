"""The command `jobsync`."""

from __future__ import annotations

import sys

__all__ = ['main']


def main() -> None:
    """Run the command line; without its packages, say which extra installs them and exit with code
    2.
    """
    try:
        import click  # noqa: F401
        import rich  # noqa: F401
    except ImportError as error:
        print(
            f'jobsync: {error.name} is missing; install it with: pip install '
            "'jobsync-workers[cli]'",
            file=sys.stderr,
        )
        raise SystemExit(2) from None
    from .main import jobsync

    jobsync(prog_name='jobsync')
