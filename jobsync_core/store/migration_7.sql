-- Version 7: a cluster that forms anew begins a new epoch, to which the audits of those before do not count; and claims know
-- which forked child recorded them.
-- The three tables are locked for a moment only: where somebody reads one in a long transaction, everybody else would have to
-- wait behind this, so that it gives way and tries again.
DO $migration$
BEGIN
    FOR attempt IN 1..200 LOOP
        BEGIN
            PERFORM set_config('lock_timeout', '100ms', true);
            -- Counts how often a first node has found no other and begun anew.
            ALTER TABLE {cluster} ADD COLUMN IF NOT EXISTS epoch bigint NOT NULL DEFAULT 0;
            -- The cluster's epoch when the task was taken. Nodes of an earlier version write 0: they live in the first epoch.
            ALTER TABLE {audit} ADD COLUMN IF NOT EXISTS epoch bigint NOT NULL DEFAULT 0;
            -- Process of the forked child that took the task for the audit; NULL: the node's main process, or not for the audit.
            ALTER TABLE {claim} ADD COLUMN IF NOT EXISTS child integer;
            EXIT;
        EXCEPTION WHEN lock_not_available THEN
            IF attempt = 200 THEN
                RAISE;
            END IF;
            PERFORM pg_sleep(0.2);
        END;
    END LOOP;
END
$migration$;

UPDATE {cluster} SET schema_version = 7 WHERE schema_version < 7;
