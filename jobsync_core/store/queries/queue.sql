-- Who owns what, for routers; and the queues that belong to nodes.

-- piece: queues
-- The queues of nodes, for each home queue; and those of earlier versions, with home ''.
(
    SELECT name, node, home, kind, gone_at FROM {node_queue} WHERE name <> ''
    UNION ALL
    SELECT name, node, '', kind, gone_at FROM {queue})

-- piece: keep
-- What a node that was known already is recorded with.
name = excluded.name, kind = excluded.kind, gone_at = NULL, broker = excluded.broker,
    place = excluded.place, application = excluded.application

-- name: record
-- Notes that a node has a queue for a home queue, and what it belongs to; true where the queue was not
-- known before.
INSERT INTO {node_queue} (node, home, name, kind, broker, place, application, queue_group)
VALUES (%(node)s, %(home)s, %(name)s, %(kind)s, %(broker)s, %(place)s, %(application)s,
    %(group)s)
ON CONFLICT (node, home) DO UPDATE SET {keep}, queue_group = excluded.queue_group
RETURNING xmax = 0

-- name: record_for_all
-- The same of a queue that is for all home queues.
INSERT INTO {queue} (name, node, kind, broker, place, application)
VALUES (%(name)s, %(node)s, %(kind)s, %(broker)s, %(place)s, %(application)s)
ON CONFLICT (name) DO UPDATE SET
    node = excluded.node, kind = excluded.kind, gone_at = NULL, broker = excluded.broker,
    place = excluded.place, application = excluded.application
RETURNING xmax = 0

-- name: tell_silent
-- Writes down whether a node reaches its broker.
UPDATE {node} SET silent = %(silent)s
WHERE name = %(node)s AND incarnation = %(incarnation)s AND silent <> %(silent)s

-- name: divided
-- Home queues that nodes in the node table give different queue groups: each of these, and its nodes.
SELECT q.home, q.queue_group, array_agg(q.node ORDER BY q.node)
FROM {node_queue} AS q JOIN {node} AS n ON n.name = q.node
WHERE q.queue_group <> '' AND q.gone_at IS NULL AND q.home = ANY(ARRAY(
    SELECT o.home FROM {node_queue} AS o JOIN {node} AS m ON m.name = o.node
    WHERE o.queue_group <> '' AND o.gone_at IS NULL
    GROUP BY o.home HAVING count(DISTINCT o.queue_group) > 1))
GROUP BY q.home, q.queue_group
ORDER BY q.home, q.queue_group

-- name: retire
-- Notes that a node which lives has none but these queues. A queue with a time counts as that of a
-- node that is gone, until it is recorded again. That of an earlier version is no longer under the
-- name of its node: producers of that version, which look for no time, would go on sending there.
UPDATE {node_queue} AS q SET gone_at = clock_timestamp()
WHERE q.node = %(node)s AND q.name <> '' AND q.name <> ALL(%(keep)s::text[]) AND q.gone_at IS NULL;
UPDATE {queue} AS q
SET gone_at = coalesce(q.gone_at, clock_timestamp()), node = q.node || ' (earlier version)'
WHERE q.node = %(node)s AND q.name <> ALL(%(keep)s::text[])

-- name: identify
-- Notes what a node belongs to, before it has a queue; true where it was not known before. Those that
-- have been gone for long and left no queue are forgotten.
DELETE FROM {node_queue} AS q
WHERE q.home = '' AND q.created_at < clock_timestamp() - interval '1 day'
    AND NOT EXISTS (SELECT FROM {node} AS n WHERE n.name = q.node)
    AND NOT EXISTS (SELECT FROM {node_queue} AS o WHERE o.node = q.node AND o.home <> '');
INSERT INTO {node_queue} (node, home, name, kind, broker, place, application)
VALUES (%(node)s, '', '', %(kind)s, %(broker)s, %(place)s, %(application)s)
ON CONFLICT (node, home) DO UPDATE SET {keep}
RETURNING xmax = 0

-- name: withdraw
-- Takes back what a node is said to belong to.
DELETE FROM {node_queue} WHERE node = %(node)s AND home = ''

-- name: withdraw_queue
-- Takes back a queue of a node.
DELETE FROM {queue} WHERE name = %(name)s AND node = %(node)s;
DELETE FROM {node_queue} WHERE name = %(name)s AND node = %(node)s AND home <> ''

-- name: peers
-- The other nodes that have sent a heartbeat lately, oldest first, and what they belong to.
SELECT n.name, coalesce(q.kind, o.kind, ''), coalesce(q.broker, o.broker, ''),
    coalesce(q.place, o.place, ''), coalesce(q.application, o.application, '')
FROM {node} AS n
LEFT JOIN {node_queue} AS q ON q.node = n.name AND q.home = ''
LEFT JOIN LATERAL (
    SELECT kind, broker, place, application FROM {queue} AS o
    WHERE o.node = n.name ORDER BY o.name LIMIT 1) AS o ON q.node IS NULL
WHERE n.name <> %(node)s
    AND n.last_heartbeat > clock_timestamp() - make_interval(secs => %(timeout)s)
    -- a worker tells what it belongs to before it becomes active
    AND (n.state <> 'joining' OR q.node IS NOT NULL OR o.kind IS NOT NULL)
ORDER BY n.created_on, n.name

-- name: orphans
-- Queues of nodes that are gone, the newest first, of which it has been known for less than so many
-- seconds, or not yet.
SELECT q.name, q.node, extract(epoch FROM clock_timestamp() - q.gone_at)::float8, q.home
FROM {queues} AS q
WHERE q.kind = %(kind)s
    AND (q.gone_at > clock_timestamp() - make_interval(secs => %(young)s)
        OR q.gone_at IS NULL AND NOT EXISTS (SELECT FROM {node} AS n WHERE n.name = q.node))
ORDER BY q.gone_at DESC NULLS FIRST, q.name

-- name: note_orphans
-- Writes down since when these are known as queues of nodes that are gone.
UPDATE {node_queue} AS q SET gone_at = clock_timestamp()
WHERE q.name = ANY(%(names)s) AND q.gone_at IS NULL
    AND NOT EXISTS (SELECT FROM {node} AS n WHERE n.name = q.node);
UPDATE {queue} AS q SET gone_at = clock_timestamp()
WHERE q.name = ANY(%(names)s) AND q.gone_at IS NULL
    AND NOT EXISTS (SELECT FROM {node} AS n WHERE n.name = q.node)

-- name: old_orphans
-- Queues of nodes that have been gone for longer, the newest first.
SELECT q.name, q.node, extract(epoch FROM clock_timestamp() - q.gone_at)::float8, q.home
FROM {queues} AS q
WHERE q.kind = %(kind)s AND q.gone_at <= clock_timestamp() - make_interval(secs => %(young)s)
ORDER BY q.gone_at DESC, q.name

-- name: known
-- All queues of a kind, their nodes and their home queues.
SELECT q.name, q.node, q.home FROM {queues} AS q WHERE q.kind = %(kind)s ORDER BY q.name

-- name: heartbeats
-- A sign of life of each node; another one after each heartbeat.
SELECT name, incarnation, last_heartbeat FROM {node}

-- name: draining
-- Queues of other nodes that live, drain, and have given all of their tokens away.
SELECT q.name, q.node, q.home FROM {queues} AS q JOIN {node} AS n ON n.name = q.node
WHERE q.kind = %(kind)s AND n.name <> %(me)s AND n.state = 'draining'
    AND NOT EXISTS (SELECT FROM {ring} AS a WHERE a.node = n.name)
ORDER BY q.name

-- name: hold
-- Tries to hold what a node left until the end of the transaction, which may be silent meanwhile.
SELECT set_config('idle_in_transaction_session_timeout', %(silent)s, true),
    pg_try_advisory_xact_lock(hashtextextended(%(what)s, 0))

-- name: hold_all
-- The same for what several nodes left.
SELECT asked.name, set_config('idle_in_transaction_session_timeout', %(silent)s, true),
    pg_try_advisory_xact_lock(hashtextextended(%(what)s || asked.name, 0))
FROM unnest(%(nodes)s::text[]) AS asked(name)

-- name: left
-- Those queues that nobody has: the node is gone, or has left the queue alone.
SELECT q.name FROM {queues} AS q
WHERE q.name = ANY(%(names)s)
    AND (q.gone_at IS NOT NULL OR NOT EXISTS (SELECT FROM {node} AS n WHERE n.name = q.node))

-- name: is_gone
-- Whether a node is not in the node table.
SELECT NOT EXISTS (SELECT FROM {node} WHERE name = %(node)s)

-- name: forget
-- Removes queues whose nodes are gone; and with the last one what the node belonged to.
DELETE FROM {queue} AS q
WHERE name = ANY(%(names)s)
    AND (q.gone_at IS NOT NULL OR NOT EXISTS (SELECT FROM {node} AS n WHERE n.name = q.node));
WITH gone AS (
    DELETE FROM {node_queue} AS q
    WHERE q.name = ANY(%(names)s)
        AND (q.gone_at IS NOT NULL OR NOT EXISTS (SELECT FROM {node} AS n WHERE n.name = q.node))
    RETURNING q.node, q.home
)
DELETE FROM {node_queue} AS q USING gone
WHERE q.node = gone.node AND q.home = ''
    AND NOT EXISTS (SELECT FROM {node} AS n WHERE n.name = q.node) AND NOT EXISTS (
    SELECT FROM {node_queue} AS o
    WHERE o.node = gone.node AND o.home <> '' AND NOT o.name = ANY(%(names)s))

-- name: owners
-- Who owns which tokens, or is about to, by token, in all queue groups; these, with whether a node
-- names them, and the queues of nodes. Nothing where the version is the known one.
SELECT c.version, c.total_tokens, c.hash_function,
    (SELECT json_agg(json_build_array(k.name, k.id, k.named))::text
        FROM (
            SELECT g.name, g.id,
                EXISTS (SELECT FROM {node} AS n WHERE g.name = ANY(n.groups)) AS named, g.formed
            FROM {queue_group} AS g) AS k
        WHERE k.named OR k.formed),
    (SELECT json_agg(json_build_array(q.node, q.home, q.name))::text
        FROM {queues} AS q JOIN {node} AS n ON n.name = q.node
        WHERE q.gone_at IS NULL),
    (SELECT json_agg(json_build_array(lower(a.tokens), upper(a.tokens), a.owner, a.blocked)
            ORDER BY a.tokens)::text
        FROM (
            SELECT r.tokens, r.blocked,
                CASE WHEN r.moving THEN coalesce(r.moving_to, CASE WHEN NOT r.blocked THEN r.node END)
                    ELSE r.node END AS owner
            FROM {ring} AS r) AS a)
FROM {cluster} AS c WHERE c.version <> %(known)s
