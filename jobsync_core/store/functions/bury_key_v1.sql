-- Lets a key be dead, if its attempt is still the same one: nothing begins it any more, until an operator says so. An attempt that ran is
-- counted as lost, and filed. The fence rises, so that an attempt that lives against all appearances records nothing.
CREATE OR REPLACE FUNCTION {bury_key} (wanted text, my_fence bigint, my_state text, buried_by text)
RETURNS boolean
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET enable_seqscan = off AS $$
DECLARE
    former {execution};
BEGIN
    SELECT * INTO former FROM {execution} AS e
    WHERE e.key = wanted AND e.fence = my_fence AND e.state = my_state AND e.state IN ('running', 'failed') FOR UPDATE;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    UPDATE {execution} AS e
    SET state = 'dead', fence = greatest(e.fence + 1, pg_current_xact_id()::text::bigint), finished_at = now(), expires_at = NULL,
        lost = e.lost + CASE e.state WHEN 'running' THEN 1 ELSE 0 END, message = NULL,
        error = 'attempts lost: ' || e.lost + CASE e.state WHEN 'running' THEN 1 ELSE 0 END || coalesce('; the last one: ' || e.error, '')
    WHERE e.key = wanted;
    RETURN former.state = 'failed' OR {file_lost_attempt}(
        wanted, former.attempts, former.fence, former.node, former.incarnation, former.host, former.pid, former.started_at, buried_by);
END
$$;
