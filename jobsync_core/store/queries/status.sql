-- What an operator sees; no decision rests on it.

-- name: nodes
-- The node table, oldest first, with what each node owns, and which have sent a heartbeat lately.
SELECT n.name, n.created_on, n.last_heartbeat, n.state, n.weight, n.incarnation, n.beat,
    n.lease_sec, n.host, n.pid,
    extract(epoch FROM clock_timestamp() - n.last_heartbeat)::float8 AS age_sec,
    clock_timestamp() - n.last_heartbeat
        < make_interval(secs => coalesce(%(timeout)s, n.lease_sec / %(lease)s)) AS alive,
    coalesce(a.tokens, 0) AS tokens, coalesce(a.leaving, 0) AS leaving, false AS is_leader,
    coalesce(n.groups, ARRAY[]::text[]) AS groups, n.silent
FROM {node} AS n LEFT JOIN (
    SELECT node, sum(upper(tokens) - lower(tokens))::int AS tokens,
        coalesce(sum(upper(tokens) - lower(tokens)) FILTER (WHERE moving), 0)::int AS leaving
    FROM {assignment} GROUP BY node
) AS a ON a.node = n.name
ORDER BY n.created_on, n.name

-- name: assignment
-- Every row of the assignment table, by token.
SELECT lower(tokens) AS lo, upper(tokens) AS hi, node, moving, moving_to, blocked, version
FROM {assignment} ORDER BY tokens

-- name: ring
-- Every row of all queue groups, by token.
SELECT lower(tokens) AS lo, upper(tokens) AS hi, node, moving, moving_to, blocked, version
FROM {ring} ORDER BY tokens

-- name: groups
-- The queue groups, and their ids; besides that of the plain Job.
SELECT name, id FROM {queue_group} ORDER BY name

-- name: rebalances
-- The last plans, newest first.
SELECT id, triggered_at, trigger_reason, leader_node, nodes_before, nodes_after, tokens_moved,
    duration_ms
FROM {rebalance} ORDER BY id DESC LIMIT %(limit)s

-- name: cluster
-- The cluster's settings and counters.
SELECT total_tokens, hash_function, version, schema_version, lock_version FROM {cluster}

-- name: owner
-- The node that the database names for a token.
SELECT node FROM {assignment} WHERE tokens @> %(token)s::int

-- name: ownership
-- The row of a token, with since when its node owns it.
SELECT node, assigned_at, version, blocked, moving, moving_to FROM {ring}
WHERE tokens @> %(token)s::int

-- name: execution
-- The ledger's row of a key.
SELECT e.key, {state_shown} AS state, e.node, e.attempts, e.started_at, e.finished_at, e.error
FROM {execution} AS e WHERE e.key = %(key)s

-- name: states
-- Each node's state.
SELECT name, state FROM {node} ORDER BY name

-- name: change_state
-- Moves a node from one state to another, or holds one that has drained itself. Not during a
-- leader's round, which would take the change into the plan's fingerprint and not into the plan.
SELECT pg_advisory_xact_lock_shared(%(first)s, %(second)s);
WITH me AS (
    UPDATE {node} SET state = %(to)s, held = %(to)s = 'draining'
    WHERE name = %(name)s
        AND (state = %(from)s OR state = 'draining' AND %(to)s = 'draining' AND NOT held)
    RETURNING name
)
SELECT pg_notify(%(channel)s, 'drain ' || name) FROM me

-- name: pins
-- The locks in force, oldest first, with the queue group in which each counts; of those that the leader looks at. Patterns that are too long
-- are left out, as the leader ignores them.
SELECT task_id,
    CASE WHEN octet_length(node_patterns::text) <= %(size)s THEN node_patterns::text END AS encoded,
    created_at, queue, pin
FROM (SELECT * FROM {lock} ORDER BY task_id LIMIT %(most)s) AS l
WHERE {in_force}
ORDER BY created_at, task_id
