-- Who has locked JobSync's tables, or waits in front of all others for such a lock.

-- piece: session
-- What is visible to this role of a session `a`.
coalesce(a.application_name, ''), coalesce(a.usename::text, ''),
    coalesce(a.state, a.backend_type, ''),
    extract(epoch FROM clock_timestamp()
        - coalesce(a.xact_start, a.query_start, a.backend_start))::float8

-- name: on_tables
-- Sessions that have locked one of these tables in one of these modes, or wait to do so; those that
-- have it first. A prepared transaction has no process.
SELECT l.pid, {session}, l.mode, c.relname::text, l.granted
FROM pg_locks AS l JOIN pg_class AS c ON c.oid = l.relation
    LEFT JOIN pg_stat_activity AS a ON a.pid = l.pid
WHERE l.locktype = 'relation'
    AND l.database = (SELECT d.oid FROM pg_database AS d WHERE d.datname = current_database())
    AND l.relation IN (SELECT to_regclass(w.name) FROM unnest(%(tables)s::text[]) AS w (name))
    AND l.pid IS DISTINCT FROM pg_backend_pid()
    AND (%(modes)s::text[] IS NULL OR l.mode = ANY(%(modes)s::text[]))
ORDER BY l.granted DESC, a.xact_start NULLS LAST, l.pid LIMIT %(most)s

-- name: on_rows
-- Sessions whose locks on rows of these tables others wait for. Whoever waits for a row has a lock on
-- its table as well, and a lock that was not granted on the transaction that is in its way.
WITH mine AS (
    SELECT w.pid, min(w.relation) AS relation FROM pg_locks AS w
    WHERE w.locktype = 'relation' AND w.granted
        AND w.database = (SELECT d.oid FROM pg_database AS d WHERE d.datname = current_database())
        AND w.relation IN (SELECT to_regclass(t.name) FROM unnest(%(tables)s::text[]) AS t (name))
        AND EXISTS (
            SELECT FROM pg_locks AS v
            WHERE v.pid = w.pid AND NOT v.granted AND v.locktype IN ('transactionid', 'tuple'))
    GROUP BY w.pid
), ahead AS (
    SELECT b.pid, min(mine.relation) AS relation
    FROM mine CROSS JOIN LATERAL unnest(pg_blocking_pids(mine.pid)) AS b (pid)
    WHERE b.pid NOT IN (SELECT pid FROM mine) GROUP BY b.pid
)
SELECT nullif(ahead.pid, 0), {session}, 'a row', c.relname::text, true
FROM ahead JOIN pg_class AS c ON c.oid = ahead.relation
    LEFT JOIN pg_stat_activity AS a ON a.pid = ahead.pid
ORDER BY a.xact_start NULLS LAST, ahead.pid LIMIT %(most)s
