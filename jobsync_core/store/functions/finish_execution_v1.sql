-- Records the completion; false where another attempt holds the key. 'done' as well, so that an attempt whose reply was lost
-- can record its completion again. The parameters are in the order of the statement that a transaction of the user's runs.
CREATE OR REPLACE FUNCTION {finish_execution} (my_result jsonb, retention_sec double precision, wanted text, my_fence bigint)
RETURNS boolean
LANGUAGE plpgsql SET enable_seqscan = off AS $$
BEGIN
    UPDATE {execution}
    SET state = 'done', result = my_result, error = NULL, finished_at = clock_timestamp(),
        expires_at = clock_timestamp() + make_interval(secs => retention_sec)
    WHERE key = wanted AND fence = my_fence AND state IN ('running', 'done');
    RETURN FOUND;
END
$$;
