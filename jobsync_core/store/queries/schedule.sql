-- The last slot of each periodic task that was sent; and which of many schedulers is the active one.

-- name: begin
-- Makes the rows of entries that are new. In one order, so that two schedulers do not wait for each
-- other in a ring.
INSERT INTO {schedule} (name, slot, entry, updated_at)
SELECT name, slot, entry, now()
FROM unnest(%(names)s::text[], %(slots)s::timestamptz[], %(entries)s::text[])
    AS wanted (name, slot, entry)
ORDER BY name
ON CONFLICT (name) DO NOTHING

-- name: states
-- What is known of entries.
SELECT name, slot, total_run_count FROM {schedule} WHERE name = ANY (%(names)s)

-- name: lock
-- Locks an entry's row until the end of the transaction; nothing where another scheduler holds it.
SELECT set_config('idle_in_transaction_session_timeout', %(silent)s, true);
SELECT slot, total_run_count FROM {schedule} WHERE name = %(name)s FOR UPDATE SKIP LOCKED

-- name: advance
-- Records that an entry's slot was sent, or passed over.
UPDATE {schedule}
SET slot = %(slot)s, total_run_count = total_run_count + %(sent)s, entry = %(entry)s,
    updated_at = now()
WHERE name = %(name)s

-- name: keep
-- Says that entries are in use. Rows that are being sent right now are in use anyway.
UPDATE {schedule} SET updated_at = now()
WHERE name IN (SELECT name FROM {schedule} WHERE name = ANY (%(names)s) FOR UPDATE SKIP LOCKED)

-- name: prune
-- Removes the other entries that have not been in use for so many seconds.
DELETE FROM {schedule}
WHERE NOT name = ANY (%(names)s) AND updated_at < now() - make_interval(secs => %(unused)s)

-- name: end_when_silent
-- Has the server end this session when it has been silent for so long.
SELECT set_config('idle_session_timeout', %(silent)s, false)

-- name: try_to_lead
-- Takes the lock of the active scheduler, if it is free.
SELECT pg_try_advisory_lock(%(key)s)

-- name: prove
-- Proves that the session is there.
SELECT 1
