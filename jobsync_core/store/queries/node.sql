-- A node's own requests: heartbeat, looks, joining and leaving.

-- piece: continues
-- Whether a node's row `n` holds the heartbeat that was last answered, or a later one that continued
-- it.
(n.beat = %(seen)s OR n.beat > %(seen)s AND n.beat % 2 = 0)

-- piece: first_history
-- Whether the database's history is its first one; not so where the role may not ask.
{history} LIKE '% 00000001'

-- piece: youngest
-- A moment later than that of every node, even where the server's clock has been set back meanwhile.
greatest(clock_timestamp(), (SELECT max(created_on) + interval '1 microsecond' FROM {node}))

-- piece: new_columns
-- What a node writes when it joins.
(name, created_on, last_heartbeat, incarnation, state, weight, lease_sec, host, boot_id,
    pid_namespace, pid, started, groups)

-- piece: new_values
-- The values of these columns. Nodes are ordered by the moment of joining.
%(name)s, {youngest}, clock_timestamp(), %(incarnation)s, %(state)s, %(weight)s, %(lease)s,
    %(host)s, %(boot_id)s, %(pid_namespace)s, %(pid)s, %(started)s, %(groups)s::text[]

-- piece: tell_of_active
-- Notifies of a node that takes part at once. One that waits is seen soon enough: hundreds that start
-- wake nobody.
CASE WHEN state = 'active' THEN pg_notify(%(channel)s, 'join ' || %(name)s)::text END

-- piece: let_old_ones_follow
-- Makes nodes of earlier versions younger than `this` one: those that lead plan no queue groups. A row
-- that somebody has locked is left as it is.
UPDATE {node} AS o SET created_on = this.created_on + interval '1 microsecond'
FROM this, (
    SELECT name FROM {node} WHERE groups IS NULL FOR NO KEY UPDATE SKIP LOCKED) AS old
WHERE o.name = old.name AND o.created_on <= this.created_on

-- name: beat
-- A heartbeat. What it reads must not grow with the number of nodes, nor with row versions that
-- somebody's open transaction keeps: its own row by name, and from `since` on a few by age.
UPDATE {node} AS n
SET beat = greatest(n.beat, CASE WHEN {continues} THEN %(number)s ELSE %(number)s + 1 END),
    last_heartbeat = clock_timestamp()
WHERE n.name = %(name)s AND n.incarnation = %(incarnation)s
RETURNING (SELECT c.version FROM {cluster} AS c), n.state,
    (extract(epoch FROM n.created_on) * 1000000)::bigint,
    (SELECT json_agg(json_build_array(o.name, o.incarnation, o.beat, o.age, o.created)
            ORDER BY o.created, o.name)::text
        FROM (
            SELECT o.name, o.incarnation, o.beat,
                (extract(epoch FROM o.created_on) * 1000000)::bigint AS created,
                extract(epoch FROM clock_timestamp() - o.last_heartbeat)::float8 AS age
            FROM {node} AS o
            WHERE (o.created_on, o.name) < (n.created_on, n.name)
                AND o.created_on
                    >= timestamptz 'epoch' + %(since)s * interval '1 microsecond'
            ORDER BY o.created_on, o.name LIMIT %(elders)s) AS o),
    {history}, (SELECT c.history FROM {cluster} AS c), n.beat % 2 = 0, n.held,
    to_json(n.groups)::text

-- name: refresh
-- A node's state, its ranges and its queue groups. The plan of a leader that knows of no groups is
-- one for whom it is enough to enter.
SELECT c.version, n.state,
    c.planned IS NOT DISTINCT FROM {fingerprint}
        OR c.planned IS NOT DISTINCT FROM {plain_fingerprint},
    (SELECT coalesce(sum(upper(i.tokens) - lower(i.tokens)), 0)::bigint
        FROM {ring} AS i WHERE i.moving_to = n.name AND i.node IS DISTINCT FROM n.name),
    mine.segments, {history}, {continues}, to_json(n.groups)::text,
    (SELECT json_agg(json_build_array(g.name, g.id) ORDER BY g.name)::text
        FROM {queue_group} AS g WHERE g.name = ANY(n.groups) OR g.id = ANY(mine.groups))
FROM {node} AS n CROSS JOIN {cluster} AS c CROSS JOIN LATERAL (
    SELECT json_agg(
            json_build_array(lower(a.tokens), upper(a.tokens), a.node, a.moving, a.moving_to,
                a.blocked, a.version)
            ORDER BY a.tokens)::text AS segments,
        array_agg(DISTINCT lower(a.tokens) >> 20) AS groups
    FROM {ring} AS a WHERE a.node = n.name) AS mine
WHERE n.name = %(name)s AND n.incarnation = %(incarnation)s

-- name: open_cluster
-- Makes the cluster's row where there is none, and holds it.
INSERT INTO {cluster} (total_tokens, hash_function, schema_version)
    SELECT %(total)s, %(hash)s, %(schema)s WHERE NOT EXISTS (SELECT FROM {cluster})
    ON CONFLICT DO NOTHING;
UPDATE {cluster} SET history = {history} WHERE history IS NULL AND {first_history};
SELECT version, total_tokens, hash_function FROM {cluster} FOR UPDATE

-- name: all
-- All nodes and their processes, oldest first.
SELECT name, incarnation, beat, host, boot_id, pid_namespace, pid, started FROM {node}
ORDER BY created_on, name

-- name: give_ids
-- Gives each of a node's queue groups an id that has none.
{give_ids}

-- name: ids
-- The ids of the queue groups that a node's row names.
SELECT g.name, g.id FROM {queue_group} AS g JOIN {node} AS n ON g.name = ANY(n.groups)
WHERE n.name = %(name)s AND n.incarnation = %(incarnation)s ORDER BY g.name

-- name: insert
-- Registers a node.
WITH this AS (
    INSERT INTO {node} {new_columns} VALUES ({new_values}) RETURNING created_on, {tell_of_active}
), followed AS (
    {let_old_ones_follow}
)
SELECT FROM this

-- name: join_at_once
-- Registers a node beside others, in one round trip; nothing where no other node is there, the name
-- is taken, or the settings are others.
{take_turn};
{give_ids};
WITH this AS (
    INSERT INTO {node} {new_columns}
    SELECT {new_values} FROM {cluster} AS c
    WHERE (c.total_tokens, c.hash_function) = (%(total)s, %(hash)s)
        AND (c.history IS NOT NULL OR NOT {first_history})
        AND EXISTS (SELECT FROM {node})
    ON CONFLICT (name) DO NOTHING
    RETURNING created_on, {tell_of_active}
), followed AS (
    {let_old_ones_follow}
)
SELECT c.version,
    (SELECT json_agg(json_build_array(o.name, o.incarnation, o.beat))::text FROM {node} AS o),
    {ids}
FROM {cluster} AS c, this

-- name: form
-- Sets what the nodes of an empty cluster must agree with. What was audited before counts no longer
-- where it begins anew, nor where tasks have other tokens from now on. Nobody holds a token of a
-- queue group.
DELETE FROM {ring}
WHERE upper(tokens) > %(total)s
    OR EXISTS (
        SELECT FROM {cluster} WHERE (total_tokens, hash_function) <> (%(total)s, %(hash)s));
UPDATE {queue_group} SET formed = false WHERE formed;
UPDATE {cluster} SET
    total_tokens = %(total)s, hash_function = %(hash)s, planned = NULL,
    version = version
        + CASE WHEN (total_tokens, hash_function) <> (%(total)s, %(hash)s) THEN 1 ELSE 0 END,
    epoch = epoch + CASE WHEN %(anew)s
        OR (total_tokens, hash_function) <> (%(total)s, %(hash)s) THEN 1 ELSE 0 END
RETURNING version

-- name: activate
-- Lets a node take part if there are enough that live; how many there are, whether it is registered,
-- and whether a plan has included it already. Nodes of earlier versions whose rows were locked as it
-- joined follow it now.
WITH counted AS (
    SELECT count(*)::int AS nodes,
        coalesce(bool_or(n.name = %(name)s AND n.incarnation = %(incarnation)s), false) AS present,
        coalesce(bool_or(n.name = %(name)s AND n.state = 'active'), false) AS included
    FROM {node} AS n
    WHERE (n.name, n.incarnation, n.beat) NOT IN (
        SELECT * FROM unnest(%(names)s::text[], %(lives)s::text[], %(beats)s::bigint[]))
), activated AS (
    UPDATE {node} AS n SET state = 'active' FROM counted
    WHERE n.name = %(name)s AND n.incarnation = %(incarnation)s AND n.state = 'joining'
        AND counted.nodes >= %(minimum)s
    RETURNING pg_notify(%(channel)s, 'join ' || n.name)::text
), this AS (
    SELECT created_on FROM {node}
    WHERE name = %(name)s AND incarnation = %(incarnation)s AND groups IS NOT NULL
), followed AS (
    {let_old_ones_follow}
)
SELECT nodes, present, included, (SELECT count(*) FROM activated) FROM counted

-- name: set_state
-- Makes a node give its tokens away and stay, or take part again; whether its row says so now. What
-- somebody has drained does not take part again by itself.
UPDATE {node} SET
    state = CASE WHEN %(by_itself)s AND held THEN state ELSE %(state)s END,
    held = CASE WHEN %(by_itself)s THEN held ELSE %(state)s = 'draining' END
WHERE name = %(name)s AND incarnation = %(incarnation)s
RETURNING state = %(state)s, pg_notify(%(channel)s, 'drain ' || name)::text

-- name: enroll
-- Makes a node's row name these queue groups; their ids.
{take_turn};
{give_ids};
UPDATE {node} SET groups = %(groups)s::text[]
WHERE name = %(name)s AND incarnation = %(incarnation)s
RETURNING {ids}, pg_notify(%(channel)s, 'enroll ' || name)::text

-- name: leave
-- Removes a node.
{take_turn};
DELETE FROM {node} WHERE name = %(name)s AND incarnation = %(incarnation)s
RETURNING pg_notify(%(channel)s, 'leave ' || name)::text

-- name: step_down
-- Makes a node the youngest, so that the next one leads.
UPDATE {node} SET created_on = {youngest}
WHERE name = %(name)s AND incarnation = %(incarnation)s
RETURNING pg_notify(%(channel)s, 'step ' || name)::text

-- name: record_history
-- Records the database's history, if it is still the one that the node knows.
UPDATE {cluster} SET history = %(history)s
WHERE history IS DISTINCT FROM %(history)s AND {history} = %(history)s
    AND EXISTS (
        SELECT FROM {node} AS n
        WHERE n.name = %(name)s AND n.incarnation = %(incarnation)s AND {continues})
