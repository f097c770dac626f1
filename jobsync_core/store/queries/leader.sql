-- A leader's round.

-- piece: gap
-- The tokens of the cluster `c` that have no row though a plan has been made, as text; '' where there
-- are none. A queue group that is not formed has no rows.
(
    SELECT CASE WHEN c.planned IS NULL OR f.number * c.total_tokens <= (
            SELECT coalesce(sum(upper(r.tokens) - lower(r.tokens)), 0)
            FROM {ring} AS r WHERE r.tokens <@ f.windows)
        THEN '' ELSE (f.windows - coalesce(
            (SELECT range_agg(r.tokens) FROM {ring} AS r), int4multirange()))::text END
    FROM (
        SELECT range_agg(int4range(w.first, w.first + c.total_tokens)) AS windows,
            count(*) AS number
        FROM (
            SELECT 0 AS first UNION ALL
            SELECT g.id << 20 FROM {queue_group} AS g WHERE g.formed) AS w) AS f)

-- piece: plan_state
-- What the cluster's row says before the plan.
c.version, c.total_tokens, c.hash_function, c.lock_version, {fingerprint},
    c.planned IS NOT DISTINCT FROM {fingerprint}, {gap}
FROM {cluster} AS c

-- name: observe
-- What a leader looks at: all nodes, whether the plan is out of date, and when the next lock expires.
SELECT c.version, c.planned IS DISTINCT FROM {fingerprint}, {gap},
    (SELECT extract(epoch FROM min(l.expires_at) - clock_timestamp())::float8
        FROM {lock} AS l WHERE l.expires_at > '-infinity' AND l.expires_at < 'infinity'),
    {members}
FROM {cluster} AS c

-- name: begin
-- Holds the cluster's row; its version, and all nodes.
SELECT FROM {cluster} FOR UPDATE;
SELECT version, {members} FROM {cluster}

-- name: open_gap
-- Makes all nodes look at their rows again.
UPDATE {cluster} SET version = %(version)s;
SELECT pg_notify(%(channel)s, %(payload)s)

-- name: prepare
-- Removes some expired locks, then tells whether there is anything to plan. SKIP LOCKED: whoever is
-- writing locks waits for the cluster's row, which this transaction holds.
WITH expired AS (
    DELETE FROM {lock} WHERE task_id IN (
        SELECT task_id FROM {lock}
        WHERE expires_at <= clock_timestamp() LIMIT %(page)s FOR UPDATE SKIP LOCKED)
    RETURNING task_id
)
UPDATE {cluster} SET lock_version = lock_version + 1 WHERE EXISTS (SELECT FROM expired);
SELECT {plan_state}

-- name: read
-- All nodes, the queue groups, and the cluster's row at the very moment at which they are read.
SELECT {members},
    (SELECT json_agg(json_build_array(g.name, g.id))::text FROM {queue_group} AS g), {plan_state}

-- name: record
-- Adds a plan to the history of plans if it changed anything, and tells all nodes of it.
WITH last AS (
    SELECT coalesce((SELECT nodes_after FROM {rebalance} ORDER BY id DESC LIMIT 1), 0) AS nodes
)
INSERT INTO {rebalance}
    (trigger_reason, leader_node, nodes_before, nodes_after, tokens_moved, duration_ms)
    SELECT %(reason)s, %(leader)s, last.nodes, %(nodes)s, %(moved)s, %(duration)s
    FROM last WHERE last.nodes <> %(nodes)s OR %(moved)s > 0 OR %(evicted)s;
SELECT pg_notify(%(channel)s, %(payload)s)

-- name: pins
-- A page of the locks, in the order of their tasks. Patterns that are too long are left out.
SELECT task_id,
    CASE WHEN octet_length(node_patterns::text) <= %(size)s THEN node_patterns::text END,
    extract(epoch FROM created_at)::float8, queue, pin
FROM {lock} WHERE task_id > %(after)s ORDER BY task_id LIMIT %(limit)s
