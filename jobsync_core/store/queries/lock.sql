-- Which task ids are pinned to which nodes.

-- piece: in_force
-- Whether a lock has not expired.
expires_at IS NULL OR expires_at > now()

-- name: take_turn
-- Whoever writes locks comes one after the other, until the end of the transaction.
SELECT pg_advisory_xact_lock(%(first)s, %(second)s)

-- name: register
-- Writes locks, of several for one task the last; how many tasks they lock, how many of these take
-- another plan, and how many differ from what was there.
WITH given AS (
    SELECT DISTINCT ON (task_id) task_id, node_patterns::jsonb AS node_patterns, reason, queue,
        now() + make_interval(secs => days * 86400) AS expires_at
    FROM unnest(%(tasks)s::text[], %(patterns)s::text[], %(reasons)s::text[], %(days)s::float8[],
            %(queues)s::text[])
        WITH ORDINALITY AS row (task_id, node_patterns, reason, days, queue, place)
    ORDER BY task_id, place DESC
), compared AS (
    SELECT given.*, old.task_id IS NULL OR old.expires_at <= now() AS fresh,
        old.task_id IS NULL OR old.expires_at <= now()
            OR old.node_patterns <> given.node_patterns
            OR old.queue IS DISTINCT FROM given.queue OR old.pin <> %(pin)s AS replan,
        (old.node_patterns, old.reason, old.created_by, old.expires_at, old.pin, old.queue)
            IS DISTINCT FROM
            (given.node_patterns, given.reason, %(creator)s, given.expires_at, %(pin)s,
                given.queue) AS differs
    FROM given LEFT JOIN {lock} AS old USING (task_id)
), written AS (
    INSERT INTO {lock} AS lock
        (task_id, node_patterns, reason, created_at, created_by, expires_at, pin, queue)
    SELECT task_id, node_patterns, reason, now(), %(creator)s, expires_at, %(pin)s, queue
    FROM compared WHERE replan OR differs
    ON CONFLICT (task_id) DO UPDATE SET
        node_patterns = excluded.node_patterns, reason = excluded.reason,
        created_by = excluded.created_by,
        created_at = CASE WHEN lock.expires_at <= now() THEN excluded.created_at
            ELSE lock.created_at END,
        expires_at = excluded.expires_at, pin = excluded.pin, queue = excluded.queue
)
SELECT count(*), count(*) FILTER (WHERE replan), count(*) FILTER (WHERE differs) FROM compared

-- name: count
-- How many locks there are.
SELECT count(*) FROM {lock}

-- name: tell
-- Tells all nodes of a change that takes no other plan.
SELECT pg_notify(%(channel)s, 'locks')

-- name: change
-- Makes the leader plan again. Its round sees the changed rows wholly or not at all: one that read
-- the old locks has recorded the old lock_version by the time this raises it.
SELECT pg_advisory_xact_lock_shared(%(first)s, %(second)s);
UPDATE {cluster} SET lock_version = lock_version + 1;
SELECT pg_notify(%(channel)s, 'locks')

-- name: all
-- The locks in force, oldest first.
SELECT task_id, node_patterns, reason, created_at, created_by, expires_at, queue FROM {lock}
WHERE {in_force}
ORDER BY created_at, task_id

-- name: count_in_force
-- How many locks are in force.
SELECT count(*) FROM {lock} WHERE {in_force}

-- name: show
-- The oldest locks in force, for people: long texts are cut.
SELECT left(task_id, %(length)s) AS task_id,
    CASE WHEN octet_length(node_patterns::text) <= %(size)s THEN node_patterns
        ELSE to_jsonb(left(node_patterns::text, %(length)s)) END AS node_patterns,
    octet_length(node_patterns::text) AS size, left(reason, %(length)s) AS reason, created_at,
    left(created_by, %(length)s) AS created_by, expires_at, left(queue, %(length)s) AS queue
FROM {lock}
WHERE {in_force}
ORDER BY created_at, task_id LIMIT %(limit)s

-- name: of_task
-- The lock in force on a task.
SELECT task_id, node_patterns, reason, created_at, created_by, expires_at, queue FROM {lock}
WHERE task_id = %(task)s AND ({in_force})

-- name: delete_by_creator
-- Removes what somebody has registered.
DELETE FROM {lock} WHERE created_by = %(creator)s

-- name: delete_queue
-- Removes what counts in one queue group alone.
DELETE FROM {lock} WHERE queue = %(queue)s

-- name: delete_all
-- Removes every lock.
DELETE FROM {lock} WHERE true

-- name: delete_kind
-- Removes what somebody registered, the pins of workers, or both.
DELETE FROM {lock} WHERE (NOT pin AND %(locks)s) OR (pin AND %(pins)s)

-- name: delete_tasks
-- Removes the locks on these tasks.
DELETE FROM {lock} WHERE task_id = ANY(%(tasks)s::text[])

-- name: delete_old_pins
-- Removes the pins on the virtual keys (`name#3`) of these tasks.
DELETE FROM {lock}
WHERE pin AND regexp_replace(task_id, '#[0-9]+$', '') = ANY(%(unpinned)s::text[])
