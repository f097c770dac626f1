-- JobSync: queries for operators, on the default prefix sync_. Each runs as printed; replace the prefix if yours differs,
-- and say SET search_path TO … first where the tables are not in a schema of your path.
-- Ages are measured by the server's clock and shown for people: JobSync itself compares no clocks.

-- == Nodes ==

-- Nodes with a heartbeat in the last 15 seconds (the default timeout).
SELECT count(*) FROM sync_node WHERE last_heartbeat > now() - interval '15 seconds';

-- All nodes, oldest first, with the age of their heartbeat.
SELECT name, state, weight, host, pid, created_on, extract(epoch FROM now() - last_heartbeat)::numeric(10, 1) AS heartbeat_age_sec
FROM sync_node ORDER BY created_on, name;

-- The leader: the oldest live node.
SELECT name FROM sync_node WHERE last_heartbeat > now() - interval '15 seconds' ORDER BY created_on, name LIMIT 1;

-- Nodes without a heartbeat, which the leader has not removed yet.
SELECT name, last_heartbeat FROM sync_node WHERE last_heartbeat <= now() - interval '15 seconds' ORDER BY last_heartbeat;

-- Nodes that are giving their tokens away.
SELECT name FROM sync_node WHERE state = 'draining';

-- == Tokens ==

-- Tokens per node, through the view with one row per token.
SELECT node, count(*) AS tokens FROM sync_token GROUP BY node ORDER BY node;

-- The same from the ranges, with shares, however many tokens there are.
SELECT node, sum(upper(tokens) - lower(tokens)) AS tokens,
       round(100.0 * sum(upper(tokens) - lower(tokens)) / sum(sum(upper(tokens) - lower(tokens))) OVER (), 2) AS percent
FROM sync_assignment GROUP BY node ORDER BY tokens DESC;

-- Who owns one token?
SELECT node, assigned_at, version FROM sync_token WHERE token_id = 4711;

-- The same without walking through the view.
SELECT node, moving_to, blocked, assigned_at, version FROM sync_assignment WHERE tokens @> 4711;

-- Tokens without an owner, and whether a lock is the reason.
SELECT lower(tokens) AS first, upper(tokens) - 1 AS last, blocked FROM sync_assignment WHERE node IS NULL ORDER BY tokens;

-- Tokens on their way from one node to another.
SELECT node AS owner, moving_to, sum(upper(tokens) - lower(tokens)) AS tokens
FROM sync_assignment WHERE moving GROUP BY node, moving_to ORDER BY node, moving_to;

-- Tokens per node in each queue group.
SELECT queue_group, node, count(*) AS tokens FROM sync_group_token GROUP BY queue_group, node ORDER BY queue_group, node;

-- Does every token have exactly one row? (The database itself refuses two.)
SELECT c.total_tokens, sum(upper(a.tokens) - lower(a.tokens)) AS assigned
FROM sync_cluster AS c LEFT JOIN sync_assignment AS a ON true GROUP BY c.total_tokens;

-- The cluster's settings and counters.
SELECT total_tokens, hash_function, version, lock_version, schema_version FROM sync_cluster;

-- == Locks ==

-- Locks in force, oldest first.
SELECT task_id, node_patterns, reason, created_by, created_at, expires_at
FROM sync_lock WHERE expires_at IS NULL OR expires_at > now() ORDER BY created_at, task_id;

-- Locks per creator and reason.
SELECT created_by, reason, count(*) FROM sync_lock GROUP BY created_by, reason ORDER BY count(*) DESC;

-- Locks that end within a day.
SELECT task_id, expires_at FROM sync_lock WHERE expires_at BETWEEN now() AND now() + interval '1 day' ORDER BY expires_at;

-- Locks none of whose patterns matches a live node: their tasks are blocked.
SELECT l.task_id, l.node_patterns, l.reason FROM sync_lock AS l
WHERE NOT EXISTS (
    SELECT FROM jsonb_array_elements_text(l.node_patterns) AS pattern
    JOIN sync_node AS n ON n.name LIKE pattern OR (pattern NOT LIKE '%@%' AND split_part(n.name, '@', 1) LIKE pattern));

-- == Rebalances ==

-- The last twenty.
SELECT id, triggered_at, trigger_reason, leader_node, nodes_before, nodes_after, tokens_moved, duration_ms
FROM sync_rebalance ORDER BY id DESC LIMIT 20;

-- Rebalances per hour in the last day: more than five mean that nodes come and go.
SELECT date_trunc('hour', triggered_at) AS hour, count(*) AS rebalances, sum(tokens_moved) AS tokens_moved
FROM sync_rebalance WHERE triggered_at > now() - interval '1 day' GROUP BY hour ORDER BY hour;

-- == Tasks ==

-- Claimed and not audited yet, per node: what would run again if the node died now.
SELECT node, count(*) AS tasks, min(created_on) AS oldest FROM sync_claim GROUP BY node ORDER BY node;

-- Audited today, per node.
SELECT node, count(*) AS tasks FROM sync_audit WHERE date = current_date GROUP BY node ORDER BY node;

-- Audited per day.
SELECT date, count(*) AS tasks, count(DISTINCT node) AS nodes FROM sync_audit GROUP BY date ORDER BY date DESC LIMIT 30;

-- Who did one task?
SELECT date, node, created_on FROM sync_audit WHERE task_id = 'order-17' ORDER BY date DESC;

-- == The ledger ==

-- Executions by state.
SELECT state, count(*) FROM sync_execution GROUP BY state ORDER BY state;

-- What runs now, longest first.
SELECT key, node, host, pid, attempts, now() - started_at AS running_for FROM sync_execution WHERE state = 'running' ORDER BY started_at LIMIT 50;

-- What failed last.
SELECT key, attempts, error, finished_at FROM sync_execution WHERE state = 'failed' ORDER BY finished_at DESC NULLS LAST LIMIT 50;

-- One key.
SELECT state, node, fence, attempts, started_at, finished_at, result, error, expires_at FROM sync_execution WHERE key = 'order:17';

-- Attempts at one key that failed or were lost.
SELECT number, outcome, node, host, pid, started_at, ended_at, error FROM sync_attempt WHERE key = 'order:17' ORDER BY fence;

-- Functions whose attempts fail or are lost most.
SELECT split_part(key, ':', 1) AS function, outcome, count(*) FROM sync_attempt GROUP BY 1, 2 ORDER BY 3 DESC LIMIT 20;

-- == The server ==

-- Connections of nodes and of the command line.
SELECT application_name, state, count(*) FROM pg_stat_activity WHERE application_name LIKE 'jobsync%' GROUP BY application_name, state ORDER BY application_name;

-- Size of the tables.
SELECT relname, pg_size_pretty(pg_total_relation_size(oid)) AS size FROM pg_class
WHERE relkind = 'r' AND relname LIKE 'sync\_%' ORDER BY pg_total_relation_size(oid) DESC;

-- Are heartbeats cheap? Nearly all updates of the node table should be hot.
SELECT n_tup_upd AS updates, n_tup_hot_upd AS hot, n_dead_tup AS dead FROM pg_stat_user_tables WHERE relname = 'sync_node';

-- == Maintenance ==

-- Keep the audit of 90 days.
DELETE FROM sync_audit WHERE date < current_date - 90;
