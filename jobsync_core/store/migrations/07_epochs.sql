-- Version 7: a cluster that forms anew begins a new epoch, to which the audits of those before do not count; and claims know
-- which forked child recorded them.

-- Heartbeats read the cluster's row: its table comes last, when those that readers and vacuum hold for longer are locked already.
-- The cluster's epoch when the task was taken. Nodes of an earlier version write 0: they live in the first epoch.
ALTER TABLE {audit} ADD COLUMN IF NOT EXISTS epoch bigint NOT NULL DEFAULT 0;
-- Process of the forked child that took the task for the audit; NULL: the node's main process, or not for the audit.
ALTER TABLE {claim} ADD COLUMN IF NOT EXISTS child integer;
-- Counts how often a first node has found no other and begun anew.
ALTER TABLE {cluster} ADD COLUMN IF NOT EXISTS epoch bigint NOT NULL DEFAULT 0;

UPDATE {cluster} SET schema_version = 7 WHERE schema_version < 7;
