-- Version 8: a node's queue tells which broker and which application it belongs to, so that two projects that share a database and
-- a prefix by accident are told apart when they start. Nodes of earlier versions leave these columns empty, which says nothing.
-- pin: locks that workers make for their pinned tasks are told from those that somebody registered, whatever their reason says.
-- Each attempt waits for its locks only briefly, since others queue up behind it.
DO $$
DECLARE
    patience text := current_setting('lock_timeout');
BEGIN
    FOR attempt IN 1..60 LOOP
        BEGIN
            PERFORM set_config('lock_timeout', '200ms', true);
            ALTER TABLE {queue} ADD COLUMN IF NOT EXISTS broker text, ADD COLUMN IF NOT EXISTS place text,
                ADD COLUMN IF NOT EXISTS application text;
            ALTER TABLE {lock} ADD COLUMN IF NOT EXISTS pin boolean NOT NULL DEFAULT false;
            EXIT;
        EXCEPTION WHEN lock_not_available THEN
            IF attempt = 60 THEN
                RAISE;
            END IF;
            PERFORM pg_sleep(0.3);
        END;
    END LOOP;
    PERFORM set_config('lock_timeout', patience, true);
END
$$;
UPDATE {lock} SET pin = true WHERE NOT pin AND reason = 'pin' AND task_id ~ '#[0-9]+$' AND created_by IN (SELECT node FROM {queue});

UPDATE {cluster} SET schema_version = 8 WHERE schema_version < 8;
