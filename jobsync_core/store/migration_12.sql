-- Version 12: a node's queue tells which broker and which application it belongs to, so that two projects that share a database and
-- a prefix by accident are told apart when they start. Nodes of earlier versions leave these columns empty, which says nothing.
ALTER TABLE {queue} ADD COLUMN IF NOT EXISTS broker text;
ALTER TABLE {queue} ADD COLUMN IF NOT EXISTS place text;
ALTER TABLE {queue} ADD COLUMN IF NOT EXISTS application text;

UPDATE {cluster} SET schema_version = 12 WHERE schema_version < 12;
