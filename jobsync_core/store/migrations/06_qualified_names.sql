-- Version 6: names with their schema, and a pinned search_path in every function, so that no function, operator or table of somebody
-- else's, in a schema where others may create things, takes the place of what is meant. Signatures and meaning are those of version 3.

-- What distinguishes the cluster's NOTIFY channel and locks from those of the same prefix in another schema; '' for clusters from before
-- this version, and in public.
ALTER TABLE {cluster} ADD COLUMN IF NOT EXISTS scope text NOT NULL DEFAULT '';

{begin_execution_v2}

{finish_execution_v2}

UPDATE {cluster} SET schema_version = 6 WHERE schema_version < 6;
