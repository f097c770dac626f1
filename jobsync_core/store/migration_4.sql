-- Version 4: heartbeats read the few oldest nodes by an index, not the whole table; the cluster knows its database's history.

-- node_age: the oldest nodes first, so that what a heartbeat reads does not grow with the nodes, nor with the dead row versions that a
-- transaction which stays open keeps.
-- history: the system identifier and the timeline under which all leases of earlier histories had ended.
-- Each attempt waits for its locks only briefly, since heartbeats queue up behind it: somebody's transaction may have read these tables.
DO $$
DECLARE
    patience text := current_setting('lock_timeout');
BEGIN
    FOR attempt IN 1..60 LOOP
        BEGIN
            PERFORM set_config('lock_timeout', '200ms', true);
            CREATE INDEX IF NOT EXISTS {node_age} ON {node} (created_on, name);
            ALTER TABLE {cluster} ADD COLUMN IF NOT EXISTS history text;
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

UPDATE {cluster} SET schema_version = 4 WHERE schema_version < 4;
