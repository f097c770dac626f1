-- Version 4: heartbeats read the few oldest nodes by an index, not the whole table; the cluster knows its database's history.

-- node_age: the oldest nodes first, so that what a heartbeat reads does not grow with the nodes, nor with the dead row versions that a
-- transaction which stays open keeps.
-- history: the system identifier and the timeline under which all leases of earlier histories had ended.
CREATE INDEX IF NOT EXISTS {node_age} ON {node} (created_on, name);
ALTER TABLE {cluster} ADD COLUMN IF NOT EXISTS history text;

UPDATE {cluster} SET schema_version = 4 WHERE schema_version < 4;
