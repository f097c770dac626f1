"""Not yet part of this version: the plugin for Dramatiq. Until it is, use jobsync_core's Job and `exactly_once` inside your actors."""
