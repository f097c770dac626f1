-- Version 11: attempts that failed or were lost are kept for a while. An attempt that completes its key leaves no row here.

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

{file_lost_attempt_v1}

{begin_attempt_v1}

UPDATE {cluster} SET schema_version = 11 WHERE schema_version < 11;
