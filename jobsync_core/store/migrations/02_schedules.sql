-- Version 2: node queues know which plugin they belong to and since when their node is gone; schedules of periodic tasks.
ALTER TABLE {queue} ADD COLUMN IF NOT EXISTS kind text NOT NULL DEFAULT '';
ALTER TABLE {queue} ADD COLUMN IF NOT EXISTS gone_at timestamptz;

-- One row per periodic task: the last slot (due time) whose message was sent.
CREATE TABLE IF NOT EXISTS {schedule} (
    name text COLLATE "C" PRIMARY KEY,
    slot timestamptz NOT NULL,
    total_run_count bigint NOT NULL DEFAULT 0,
    entry text,
    updated_at timestamptz NOT NULL DEFAULT now()
);

UPDATE {cluster} SET schema_version = 2 WHERE schema_version < 2;
