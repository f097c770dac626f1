-- Files an attempt whose node was gone when another took its key over, in place of the one a hundred before; always true.
CREATE OR REPLACE FUNCTION {file_lost_attempt} (
    wanted text, my_number integer, my_fence bigint, my_node text, my_incarnation text, my_host text, my_pid integer, my_begin timestamptz,
    taken_by text)
RETURNS boolean
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    INSERT INTO {attempt}
        (key, slot, number, fence, outcome, node, incarnation, host, pid, started_at, ended_at, error, expires_at)
    VALUES (wanted, mod(my_number, 100), my_number, my_fence, 'lost', my_node, my_incarnation, my_host, my_pid, my_begin, now(),
            'its node was gone: ' || taken_by || ' took the key over', now() + interval '7 days')
    ON CONFLICT (key, slot) DO UPDATE SET
        number = excluded.number, fence = excluded.fence, outcome = excluded.outcome, node = excluded.node,
        incarnation = excluded.incarnation, host = excluded.host, pid = excluded.pid, started_at = excluded.started_at,
        ended_at = excluded.ended_at, error = excluded.error, expires_at = excluded.expires_at;
    RETURN true;
END
$$;
