-- The cluster's row, and what every change of ownership begins with.

-- piece: take_turn
-- Goes before what changes ownership: no leader plans meanwhile, and nobody else changes any.
SELECT pg_advisory_xact_lock_shared(%(lock_first)s, %(lock_second)s);
SELECT FROM {cluster} FOR UPDATE

-- piece: fingerprint
-- What a plan depends on, as text; `c` is the cluster's row. The bytes of a float8: how it becomes
-- text depends on settings of the session. Where no node names a queue group it is that of nodes
-- which know of none.
(
    SELECT encode(sha256(convert_to(concat(
        json_agg(json_build_array(f.name, f.incarnation, f.state, float8send(f.weight))
            ORDER BY f.name)::text,
        c.lock_version, {named_groups}), 'UTF8')), 'hex')
    FROM {node} AS f)

-- piece: named_groups
-- The queue groups of nodes `f`, as text; NULL where none has any.
(json_agg(json_build_array(f.name, f.groups) ORDER BY f.name)
    FILTER (WHERE cardinality(f.groups) > 0))::text

-- piece: plain_fingerprint
-- The fingerprint as a leader makes it that knows of no queue groups.
(
    SELECT encode(sha256(convert_to(concat(
        json_agg(json_build_array(f.name, f.incarnation, f.state, float8send(f.weight))
            ORDER BY f.name)::text,
        c.lock_version), 'UTF8')), 'hex')
    FROM {node} AS f)

-- piece: give_ids
-- Gives each of these queue groups an id that has none; those that nobody names and that have no
-- tokens lose theirs. Whoever sends it holds the cluster's row.
DELETE FROM {queue_group} AS g
WHERE NOT g.formed AND g.name <> ALL(%(groups)s::text[])
    AND NOT %(groups)s::text[] <@ ARRAY(SELECT k.name FROM {queue_group} AS k)
    AND NOT EXISTS (SELECT FROM {node} AS n WHERE g.name = ANY(n.groups))
    AND NOT EXISTS (
        SELECT FROM {ring} AS r
        WHERE r.tokens && int4range(g.id << 20, (g.id << 20) + 1000000));
INSERT INTO {queue_group} (id, name)
SELECT free.id, new.name
FROM (
    SELECT w.name, row_number() OVER (ORDER BY w.name) AS place
    FROM unnest(%(groups)s::text[]) AS w (name)
    WHERE NOT EXISTS (SELECT FROM {queue_group} AS k WHERE k.name = w.name)) AS new
JOIN (
    SELECT i.id, row_number() OVER (ORDER BY i.id) AS place
    FROM generate_series(1, 2047 + cardinality(%(groups)s::text[])) AS i (id)
    WHERE NOT EXISTS (SELECT FROM {queue_group} AS k WHERE k.id = i.id)) AS free USING (place)

-- piece: ids
-- The ids of these queue groups, as JSON text.
(
    SELECT json_agg(json_build_array(g.name, g.id) ORDER BY g.name)::text
    FROM {queue_group} AS g WHERE g.name = ANY(%(groups)s::text[]))

-- piece: members
-- The node table, the eldest first, as JSON text. Microseconds, not seconds, for the same reason.
(
    SELECT json_agg(json_build_array(m.name, m.incarnation, m.beat,
            (extract(epoch FROM m.created_on) * 1000000)::bigint, m.state, m.weight,
            ARRAY(SELECT g.id FROM {queue_group} AS g WHERE g.name = ANY(m.groups) ORDER BY g.id))
        ORDER BY m.created_on, m.name)::text
    FROM {node} AS m)

-- name: lock_out_all
-- Holds the cluster's lock until the end of the transaction: only one leader at a time.
SELECT pg_advisory_xact_lock(%(lock_first)s, %(lock_second)s)

-- name: lock_out_leaders
-- Holds the cluster's lock together with others that are no leaders.
SELECT pg_advisory_xact_lock_shared(%(lock_first)s, %(lock_second)s)

-- name: delete_unchanged
-- Removes nodes that still look as they were seen. Their tokens become unowned.
DELETE FROM {node} AS n
USING unnest(%(names)s::text[], %(lives)s::text[], %(beats)s::bigint[])
    AS s (name, incarnation, beat)
WHERE n.name = s.name AND n.incarnation = s.incarnation AND n.beat = s.beat
RETURNING n.name

-- name: delete_unlocked
-- The same, but a node whose row somebody else has locked is left for another time, and holds up no
-- other. The plan is out of date then, even if a Join that comes late brings the same life back
-- before the next one. Not NULL: tokens without a row are missing rows as before.
WITH gone AS (
    DELETE FROM {node} AS n USING (
        SELECT m.name FROM {node} AS m
        JOIN unnest(%(names)s::text[], %(lives)s::text[], %(beats)s::bigint[])
            AS s (name, incarnation, beat)
            ON m.name = s.name AND m.incarnation = s.incarnation AND m.beat = s.beat
        FOR UPDATE OF m SKIP LOCKED) AS d
    WHERE n.name = d.name
    RETURNING n.name
), outdated AS (
    UPDATE {cluster} SET planned = '' WHERE planned IS NOT NULL AND EXISTS (SELECT FROM gone)
)
SELECT name FROM gone

-- name: begin_epoch
-- Begins another epoch, if no plan and no hand-over has come since a version.
UPDATE {cluster} SET epoch = epoch + 1 WHERE version = %(version)s RETURNING epoch
