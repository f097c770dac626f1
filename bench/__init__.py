"""Measurements of JobSync beside the package `jobsync` from PyPI: `python -m bench`."""
