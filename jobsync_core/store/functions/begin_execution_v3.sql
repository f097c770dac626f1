-- Takes a key if it is new, failed, expired, or running under an incarnation that is no longer in the node table.
-- For processes of versions up to 10: they know of no limit; to them a dead key is one that runs elsewhere, and attempts that they
-- take over are counted as lost.
-- One statement: it looks at the row in the statement's snapshot, decides there whether the key is free, and takes it only if
-- the row is still the one that it looked at.
-- A new row's fence is the id of the transaction that makes it, not 1: so fences of a key rise even across the deletion
-- of its expired row, and an attempt that slept through that deletion is still told apart.
-- enable_seqscan: a kept plan that was made while a table was tiny would read the whole of it when it has grown.
CREATE OR REPLACE FUNCTION {begin_execution} (
    wanted text, my_node text, my_incarnation text, my_host text, my_boot_id text, my_pid_namespace text, my_pid integer, my_started text)
RETURNS TABLE (
    began boolean, registered boolean, state text, free boolean, fence bigint, attempts integer, result jsonb,
    node text, incarnation text, host text, boot_id text, pid_namespace text, pid integer, started text)
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET enable_seqscan = off AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
    WITH seen AS (
        SELECT e.key, e.state, e.fence, e.attempts, e.node, e.incarnation, e.host, e.boot_id, e.pid_namespace, e.pid, e.started,
               CASE WHEN e.state = 'done' THEN e.result END AS result,
               CASE e.state
                   WHEN 'failed' THEN true
                   WHEN 'done' THEN coalesce(e.expires_at <= now(), false)
                   WHEN 'dead' THEN false
                   ELSE NOT EXISTS (SELECT FROM {node} AS n WHERE n.name = e.node AND n.incarnation = e.incarnation)
               END AS free
        FROM {execution} AS e
        WHERE e.key = wanted
    ), begun AS (
        INSERT INTO {execution} AS e
            (key, state, node, incarnation, host, boot_id, pid_namespace, pid, started, fence, attempts, started_at)
        SELECT wanted, 'running', me.name, me.incarnation, my_host, my_boot_id, my_pid_namespace, my_pid, my_started,
               pg_current_xact_id()::text::bigint, 1, now()
        FROM {node} AS me LEFT JOIN seen ON true
        WHERE me.name = my_node AND me.incarnation = my_incarnation AND coalesce(seen.free, true)
        ON CONFLICT (key) DO UPDATE SET
            state = 'running', node = excluded.node, incarnation = excluded.incarnation, host = excluded.host,
            boot_id = excluded.boot_id, pid_namespace = excluded.pid_namespace, pid = excluded.pid, started = excluded.started,
            fence = greatest(e.fence + 1, excluded.fence), attempts = CASE e.state WHEN 'done' THEN 1 ELSE e.attempts + 1 END,
            lost = CASE e.state WHEN 'done' THEN 0 WHEN 'running' THEN e.lost + 1 ELSE e.lost END,
            started_at = now(), finished_at = NULL, result = NULL, error = NULL, expires_at = NULL, message = NULL
        WHERE (e.fence, e.state) = (SELECT seen.fence, seen.state FROM seen)
        RETURNING e.fence, e.attempts
    )
    SELECT begun.fence IS NOT NULL,
           EXISTS (SELECT FROM {node} AS me WHERE me.name = my_node AND me.incarnation = my_incarnation),
           seen.state, seen.free, coalesce(begun.fence, seen.fence), coalesce(begun.attempts, seen.attempts), seen.result,
           seen.node, seen.incarnation, seen.host, seen.boot_id, seen.pid_namespace, seen.pid, seen.started
    FROM (VALUES (1)) AS always LEFT JOIN begun ON true LEFT JOIN seen ON true;
END
$$;
