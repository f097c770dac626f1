"""JobSync under its short name: everything that `jobsync_core` makes public."""

from __future__ import annotations

from jobsync_core import *  # noqa: F403
from jobsync_core import __all__ as __all__
from jobsync_core import __version__ as __version__
