-- Version 8: a node's queue tells which broker and which application it belongs to, so that two projects that share a database and
-- a prefix by accident are told apart when they start. Nodes of earlier versions leave these columns empty, which says nothing.
-- pin: locks that workers make for their pinned tasks are told from those that somebody registered, whatever their reason says.
ALTER TABLE {queue} ADD COLUMN IF NOT EXISTS broker text, ADD COLUMN IF NOT EXISTS place text, ADD COLUMN IF NOT EXISTS application text;
ALTER TABLE {lock} ADD COLUMN IF NOT EXISTS pin boolean NOT NULL DEFAULT false;
UPDATE {lock} SET pin = true WHERE NOT pin AND reason = 'pin' AND task_id ~ '#[0-9]+$' AND created_by IN (SELECT node FROM {queue});

UPDATE {cluster} SET schema_version = 8 WHERE schema_version < 8;
