"""`jobsync_core.testing`, used as users use it."""
