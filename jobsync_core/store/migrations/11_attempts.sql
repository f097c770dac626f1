-- Version 11: attempts that failed or were lost are kept for a while, and those that were lost are counted. An attempt that completes its key
-- leaves no row here.

-- The last hundred of each key: slot is the number of the attempt, modulo 100. A later one takes the place of an earlier one.
CREATE TABLE IF NOT EXISTS {attempt} (
    key text COLLATE "C" NOT NULL,
    slot integer NOT NULL,
    number integer NOT NULL,
    fence bigint NOT NULL,
    outcome text NOT NULL CHECK (outcome IN ('failed', 'lost')),
    node text COLLATE "C",
    incarnation text,
    host text,
    pid integer,
    started_at timestamptz,
    ended_at timestamptz NOT NULL,
    error text,
    expires_at timestamptz NOT NULL,
    PRIMARY KEY (key, slot)
) WITH (autovacuum_vacuum_scale_factor = 0.01, autovacuum_vacuum_threshold = 10000, autovacuum_vacuum_cost_limit = 2000);
CREATE INDEX IF NOT EXISTS {attempt_expiry} ON {attempt} (expires_at);

-- How many attempts at the key were lost. The message of a dead key, where nobody else keeps it.
ALTER TABLE {execution} ADD COLUMN IF NOT EXISTS lost integer NOT NULL DEFAULT 0;
ALTER TABLE {execution} ADD COLUMN IF NOT EXISTS message jsonb;
-- A key is dead of which too many attempts were lost: nothing begins it any more. The former constraint has a name that PostgreSQL made.
DO $constraint$
DECLARE
    former name;
BEGIN
    IF EXISTS (
        SELECT FROM pg_constraint AS c WHERE c.conrelid = $name$ {execution} $name$::regclass AND c.conname = 'known_state')
    THEN
        RETURN;
    END IF;
    FOR former IN
        SELECT c.conname FROM pg_constraint AS c
        WHERE c.conrelid = $name$ {execution} $name$::regclass AND c.contype = 'c' AND c.conkey = ARRAY[(
            SELECT a.attnum FROM pg_attribute AS a WHERE a.attrelid = c.conrelid AND a.attname = 'state')]
    LOOP
        EXECUTE 'ALTER TABLE ' || $name$ {execution} $name$ || ' DROP CONSTRAINT ' || quote_ident(former);
    END LOOP;
    ALTER TABLE {execution} ADD CONSTRAINT known_state CHECK (state IN ('running', 'done', 'failed', 'dead')) NOT VALID;
END
$constraint$;

{file_lost_attempt_v1}

{bury_key_v1}

{begin_attempt_v1}

{begin_execution_v3}

UPDATE {cluster} SET schema_version = 11 WHERE schema_version < 11;
