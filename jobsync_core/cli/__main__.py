"""`python -m jobsync_core.cli`."""

from . import main

main()
