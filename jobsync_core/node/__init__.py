"""What stands behind a Job: a node of a cluster, or a single process without one."""
