-- What operators see of the ledger, and mend. A table of millions of rows is read in slices, in the
-- order of keys: each statement looks at no more than so many rows, by the primary key, and tells
-- where the next one goes on. No statement locks a row that it does not change.

-- piece: by_keys
-- Rows are found by the primary key, whatever the statistics of a table that has just grown say.
SELECT set_config('enable_seqscan', 'off', true), set_config('enable_bitmapscan', 'off', true),
    set_config('enable_hashjoin', 'off', true), set_config('enable_mergejoin', 'off', true),
    set_config('jit', 'off', true)

-- piece: within
-- The keys from which on is read: within the range of the filter, behind the slice before.
e.key >= %(first)s AND (%(end)s::text IS NULL OR e.key < %(end)s) AND e.key > %(after)s

-- piece: slice
-- The last key of the slice, and how many it has.
slice AS (
    SELECT max(s.key) AS last, count(*) AS looked
    FROM (SELECT e.key FROM {execution} AS e WHERE {within} ORDER BY e.key LIMIT %(rows)s) AS s
)

-- piece: is_lost
-- Whether an attempt runs by the row's word alone: the life of the node that began it is over.
(e.state = 'running' AND NOT EXISTS (
    SELECT FROM {node} AS n WHERE n.name = e.node AND n.incarnation = e.incarnation))

-- piece: state_shown
-- The state, for people.
CASE WHEN {is_lost} THEN 'lost' ELSE e.state END

-- piece: chosen
-- The filter. An attempt is as old as its end, or as its begin while it has none.
(%(states)s::text[] IS NULL OR {state_shown} = ANY(%(states)s::text[]))
    AND (%(pattern)s::text IS NULL OR e.key LIKE %(pattern)s)
    AND (%(node)s::text IS NULL OR e.node = %(node)s)
    AND (%(age)s::float8 IS NULL
        OR coalesce(e.finished_at, e.started_at) < now() - make_interval(secs => %(age)s))

-- piece: shown
-- What is shown of a row. A time that Python has not, as somebody has written it by hand, is none.
e.key, {state_shown} AS state, e.node, e.attempts, e.fence, e.host, e.pid,
    CASE WHEN e.started_at BETWEEN '0002-01-01' AND '9998-12-31' THEN e.started_at END AS started_at,
    CASE WHEN e.finished_at BETWEEN '0002-01-01' AND '9998-12-31' THEN e.finished_at END
        AS finished_at,
    CASE WHEN e.expires_at BETWEEN '0002-01-01' AND '9998-12-31' THEN e.expires_at END AS expires_at,
    e.error, e.lost

-- name: page
-- The rows of a slice that a filter chooses, so many at most, beside where the slice ends.
{by_keys};
WITH {slice}
SELECT slice.last, slice.looked, found.*
FROM slice LEFT JOIN LATERAL (
    SELECT {shown} FROM {execution} AS e
    WHERE {within} AND e.key <= slice.last AND {chosen}
    ORDER BY e.key LIMIT %(limit)s) AS found ON true

-- name: count
-- How many rows of a slice a filter chooses, and where the slice ends.
{by_keys};
WITH {slice}
SELECT slice.last, slice.looked, (
    SELECT count(*) FROM {execution} AS e
    WHERE {within} AND e.key <= slice.last AND {chosen})
FROM slice

-- piece: ended
-- Nobody is at it.
(e.state IN ('done', 'failed', 'dead') OR {is_lost})

-- name: purge
-- Deletes the rows of a slice that a filter chooses, but none of a live node's running ones; how many,
-- and where the slice ends. A row that somebody else has locked stays. Rows go by their place on disk
-- (ctid), which a change moves: so a key that a node takes over meanwhile stays, though that node may
-- not be in what this statement sees of the node table.
{by_keys};
WITH {slice}, gone AS (
    DELETE FROM {execution} WHERE ctid = ANY(ARRAY(
        SELECT e.ctid FROM slice, {execution} AS e
        WHERE {within} AND e.key <= slice.last AND {chosen} AND {ended}
        FOR UPDATE OF e SKIP LOCKED))
    RETURNING key
), former AS (
    DELETE FROM {attempt} AS a USING gone WHERE a.key = gone.key
)
SELECT slice.last, slice.looked, (SELECT count(*) FROM gone) FROM slice

-- name: look
-- One key's row, with its result and its message as they are stored, and for how many seconds a running one's node has
-- been silent.
SELECT {shown}, e.result::text AS result, e.message::text AS message, (
    SELECT extract(epoch FROM clock_timestamp() - n.last_heartbeat)::float8 FROM {node} AS n
    WHERE e.state = 'running' AND n.name = e.node AND n.incarnation = e.incarnation) AS silent_sec
FROM {execution} AS e WHERE e.key = %(key)s

-- name: free
-- Lets a key begin anew that failed, was lost or is dead, with nothing lost any more, if its attempt is
-- still the same one and nobody has locked its row. A kept message stays, and the row with it, until
-- the key is begun.
WITH mine AS (
    SELECT e.key, e.state FROM {execution} AS e
    WHERE e.key = %(key)s AND e.fence = %(fence)s AND (e.state IN ('failed', 'dead') OR {is_lost})
    FOR UPDATE OF e SKIP LOCKED
), freed AS (
    UPDATE {execution} AS e
    SET state = 'failed', lost = 0,
        expires_at = CASE WHEN mine.state = 'failed' OR e.message IS NOT NULL THEN e.expires_at
            ELSE now() + make_interval(secs => %(retention)s) END,
        error = CASE mine.state WHEN 'running' THEN %(error)s ELSE e.error END,
        finished_at = CASE mine.state WHEN 'running' THEN now() ELSE e.finished_at END
    FROM mine WHERE e.key = mine.key
    RETURNING e.*, mine.state AS former
), filed AS (
    {filing}
    SELECT f.key, mod(f.attempts, 100), f.attempts, f.fence, 'lost', f.node, f.incarnation, f.host,
        f.pid, f.started_at, f.finished_at, f.error, f.expires_at
    FROM freed AS f WHERE f.former = 'running'
    {in_its_slot}
)
SELECT FROM freed

-- name: attempts
-- The attempts at a key that failed or were lost, in their order.
SELECT a.number, a.outcome, a.node, a.host, a.pid, a.fence,
    CASE WHEN a.started_at BETWEEN '0002-01-01' AND '9998-12-31' THEN a.started_at END AS started_at,
    CASE WHEN a.ended_at BETWEEN '0002-01-01' AND '9998-12-31' THEN a.ended_at END AS ended_at,
    a.error
FROM {attempt} AS a WHERE a.key = %(key)s ORDER BY a.fence

-- name: forget
-- Deletes the row of a key at which nobody is, and those of its earlier attempts, if it is still of
-- the same attempt and nobody has locked it.
WITH mine AS (
    SELECT e.key FROM {execution} AS e
    WHERE e.key = %(key)s AND e.fence = %(fence)s AND {ended}
    FOR UPDATE OF e SKIP LOCKED
), gone AS (
    DELETE FROM {execution} AS e USING mine WHERE e.key = mine.key
    RETURNING e.key
), former AS (
    DELETE FROM {attempt} AS a USING gone WHERE a.key = gone.key
)
SELECT FROM gone
