-- What the leader tidies. Each statement changes at most so many rows, finds them by an index, and
-- waits for no lock of a row; it tells how many it changed, and where the next one goes on.
--
-- Rows are deleted by their place on disk (ctid), which a concurrent change moves: so only versions
-- that the statement itself has looked at and locked are deleted, never what somebody made of them
-- meanwhile. A deleted key's fences go on to rise, since a new row begins with the id of its
-- transaction.

-- name: expired_executions
-- Deletes keys that are past their time; a running one only where its node is gone.
WITH gone AS (
    DELETE FROM {execution} WHERE ctid = ANY(ARRAY(
        SELECT e.ctid FROM {execution} AS e
        WHERE e.expires_at <= now()
            AND e.expires_at >= coalesce(%(position)s::timestamptz, '-infinity')
            AND (e.state IN ('done', 'failed') OR NOT EXISTS (
                SELECT FROM {node} AS n WHERE n.name = e.node AND n.incarnation = e.incarnation))
        ORDER BY e.expires_at LIMIT %(rows)s FOR UPDATE OF e SKIP LOCKED))
    RETURNING expires_at
)
SELECT count(*), max(expires_at)::text FROM gone

-- name: expired_attempts
-- Deletes earlier attempts that are past their time.
WITH gone AS (
    DELETE FROM {attempt} WHERE ctid = ANY(ARRAY(
        SELECT a.ctid FROM {attempt} AS a
        WHERE a.expires_at <= now()
            AND a.expires_at >= coalesce(%(position)s::timestamptz, '-infinity')
        ORDER BY a.expires_at LIMIT %(rows)s FOR UPDATE OF a SKIP LOCKED))
    RETURNING expires_at
)
SELECT count(*), max(expires_at)::text FROM gone

-- name: lost_executions
-- Gives running rows of nodes that are gone an end: they may be taken over for as long as they are
-- there. The lives (a node's name and incarnation) that have rows are each found by one step down
-- the index.
WITH RECURSIVE lives AS (
    (SELECT node, incarnation FROM {execution} WHERE state = 'running'
        ORDER BY node, incarnation LIMIT 1)
    UNION ALL
    SELECT next.node, next.incarnation FROM lives CROSS JOIN LATERAL (
        SELECT t.node, t.incarnation FROM {execution} AS t
        WHERE state = 'running' AND (t.node, t.incarnation) > (lives.node, lives.incarnation)
        ORDER BY t.node, t.incarnation LIMIT 1) AS next
), gone AS (
    SELECT lives.node, lives.incarnation FROM lives
    WHERE NOT EXISTS (
        SELECT FROM {node} AS n WHERE n.name = lives.node AND n.incarnation = lives.incarnation)
), marked AS (
    UPDATE {execution} SET expires_at = now() + make_interval(days => %(lost_days)s)
    WHERE ctid = ANY(ARRAY(
        SELECT e.ctid FROM gone JOIN {execution} AS e
            ON e.node = gone.node AND e.incarnation = gone.incarnation
        WHERE e.state = 'running' AND e.expires_at IS NULL
        LIMIT %(rows)s FOR UPDATE OF e SKIP LOCKED))
    RETURNING 1
)
SELECT count(*), NULL FROM marked

-- name: lost_claims
-- Deletes claims of nodes that are gone, found likewise.
WITH RECURSIVE lives AS (
    (SELECT node, incarnation FROM {claim} WHERE true ORDER BY node, incarnation LIMIT 1)
    UNION ALL
    SELECT next.node, next.incarnation FROM lives CROSS JOIN LATERAL (
        SELECT t.node, t.incarnation FROM {claim} AS t
        WHERE true AND (t.node, t.incarnation) > (lives.node, lives.incarnation)
        ORDER BY t.node, t.incarnation LIMIT 1) AS next
), gone AS (
    SELECT lives.node, lives.incarnation FROM lives
    WHERE NOT EXISTS (
        SELECT FROM {node} AS n WHERE n.name = lives.node AND n.incarnation = lives.incarnation)
), deleted AS (
    DELETE FROM {claim} WHERE ctid = ANY(ARRAY(
        SELECT c.ctid FROM gone JOIN {claim} AS c
            ON c.node = gone.node AND c.incarnation = gone.incarnation
        WHERE c.created_on < now() - make_interval(secs => %(claim_sec)s)
        LIMIT %(rows)s FOR UPDATE OF c SKIP LOCKED))
    RETURNING 1
)
SELECT count(*), NULL FROM deleted

-- name: old_promises
-- Deletes promises that nobody came back to.
WITH deleted AS (
    DELETE FROM {claim} WHERE ctid = ANY(ARRAY(
        SELECT c.ctid FROM {claim} AS c
        WHERE c.promised AND c.created_on < now() - make_interval(secs => %(claim_sec)s)
        ORDER BY c.created_on LIMIT %(rows)s FOR UPDATE SKIP LOCKED))
    RETURNING 1
)
SELECT count(*), NULL FROM deleted

-- name: old_rebalances
-- Deletes old rows of the history of plans. Ids rise with time, so that the oldest rows are the first
-- of the primary key.
WITH deleted AS (
    DELETE FROM {rebalance} WHERE ctid = ANY(ARRAY(
        SELECT r.ctid FROM {rebalance} AS r
        WHERE r.triggered_at < now() - make_interval(days => %(rebalance_days)s)
            OR r.id <= (
                SELECT k.id FROM {rebalance} AS k ORDER BY k.id DESC
                OFFSET %(rebalance_rows)s LIMIT 1)
        ORDER BY r.id LIMIT %(rows)s FOR UPDATE SKIP LOCKED))
    RETURNING 1
)
SELECT count(*), NULL FROM deleted
