-- Version 9: rows of the ledger that an earlier version began are told from those of this one, so that a key which an earlier version may
-- have written for one call is not taken for the present key of another.
-- former_until: the fence of a row that an earlier version began before this migration is lower; a fence begins with the id of a transaction.
ALTER TABLE {cluster} ADD COLUMN IF NOT EXISTS former_until bigint;
UPDATE {cluster} SET former_until = pg_current_xact_id()::text::bigint WHERE former_until IS NULL;

UPDATE {cluster} SET schema_version = 9 WHERE schema_version < 9;
