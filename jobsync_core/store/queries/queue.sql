-- Who owns what, for routers; and the queues that belong to nodes.

-- name: record
-- Notes that a node has a queue, and what it belongs to; true where the queue was not known before.
INSERT INTO {queue} (name, node, kind, broker, place, application)
VALUES (%(name)s, %(node)s, %(kind)s, %(broker)s, %(place)s, %(application)s)
ON CONFLICT (name) DO UPDATE SET
    node = excluded.node, kind = excluded.kind, gone_at = NULL, broker = excluded.broker,
    place = excluded.place, application = excluded.application
RETURNING xmax = 0

-- name: withdraw
-- Takes back what was recorded for a node.
DELETE FROM {queue} WHERE name = %(name)s AND node = %(node)s

-- name: peers
-- The other nodes that have sent a heartbeat lately, oldest first, and what they belong to.
SELECT n.name, coalesce(q.kind, ''), coalesce(q.broker, ''), coalesce(q.place, ''),
    coalesce(q.application, '')
FROM {node} AS n LEFT JOIN {queue} AS q ON q.node = n.name
WHERE n.name <> %(node)s
    AND n.last_heartbeat > clock_timestamp() - make_interval(secs => %(timeout)s)
    -- a worker records its queue before it becomes active
    AND (n.state <> 'joining' OR q.node IS NOT NULL)
ORDER BY n.created_on, n.name

-- name: orphans
-- Queues of nodes that are gone, the newest first, of which it has been known for less than so many
-- seconds, or not yet.
SELECT q.name, q.node, extract(epoch FROM clock_timestamp() - q.gone_at)::float8
FROM {queue} AS q
WHERE q.kind = %(kind)s
    AND (q.gone_at IS NULL OR q.gone_at > clock_timestamp() - make_interval(secs => %(young)s))
    AND NOT EXISTS (SELECT FROM {node} AS n WHERE n.name = q.node)
ORDER BY q.gone_at DESC NULLS FIRST, q.name

-- name: note_orphans
-- Writes down since when these are known as queues of nodes that are gone.
UPDATE {queue} AS q SET gone_at = clock_timestamp()
WHERE q.name = ANY(%(names)s) AND q.gone_at IS NULL
    AND NOT EXISTS (SELECT FROM {node} AS n WHERE n.name = q.node)

-- name: old_orphans
-- Queues of nodes that have been gone for longer, the newest first.
SELECT q.name, q.node, extract(epoch FROM clock_timestamp() - q.gone_at)::float8
FROM {queue} AS q
WHERE q.kind = %(kind)s AND q.gone_at <= clock_timestamp() - make_interval(secs => %(young)s)
    AND NOT EXISTS (SELECT FROM {node} AS n WHERE n.name = q.node)
ORDER BY q.gone_at DESC, q.name

-- name: known
-- All queues of a kind, and their nodes.
SELECT name, node FROM {queue} WHERE kind = %(kind)s ORDER BY name

-- name: heartbeats
-- A sign of life of each node; another one after each heartbeat.
SELECT name, incarnation, last_heartbeat FROM {node}

-- name: draining
-- Queues of other nodes that live, drain, and have given all of their tokens away.
SELECT q.name, q.node FROM {queue} AS q JOIN {node} AS n ON n.name = q.node
WHERE q.kind = %(kind)s AND n.name <> %(me)s AND n.state = 'draining'
    AND NOT EXISTS (SELECT FROM {assignment} AS a WHERE a.node = n.name)
ORDER BY q.name

-- name: hold
-- Tries to hold what a node left until the end of the transaction, which may be silent meanwhile.
SELECT set_config('idle_in_transaction_session_timeout', %(silent)s, true),
    pg_try_advisory_xact_lock(hashtextextended(%(what)s, 0))

-- name: is_gone
-- Whether a node is not in the node table.
SELECT NOT EXISTS (SELECT FROM {node} WHERE name = %(node)s)

-- name: forget
-- Removes a queue whose node is gone.
DELETE FROM {queue} AS q
WHERE name = %(name)s AND NOT EXISTS (SELECT FROM {node} AS n WHERE n.name = q.node)

-- name: owners
-- Who owns which tokens, or is about to, by token; nothing where the version is the known one.
WITH now AS (
    SELECT version, total_tokens, hash_function FROM {cluster} WHERE version <> %(known)s
)
SELECT now.version, now.total_tokens, now.hash_function, lower(a.tokens), upper(a.tokens), a.owner,
    q.name
FROM now
LEFT JOIN (
    SELECT tokens,
        CASE WHEN moving THEN coalesce(moving_to, CASE WHEN NOT blocked THEN node END)
            ELSE node END AS owner
    FROM {assignment}
) AS a ON a.owner IS NOT NULL
LEFT JOIN {queue} AS q ON q.node = a.owner
ORDER BY 4
