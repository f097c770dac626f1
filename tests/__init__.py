"""Tests of JobSync. Each name states the property that holds."""
