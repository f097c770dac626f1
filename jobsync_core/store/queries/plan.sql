-- A plan's way into the assignment table.

-- piece: same
-- Whether a row `a` is still as it was read. Deleting a node changes `node` and `moving_to` without a
-- new version.
lower(a.tokens) = o.lo AND upper(a.tokens) = o.hi AND a.version = o.version
    AND a.node IS NOT DISTINCT FROM o.node
    AND a.moving = o.moving AND a.moving_to IS NOT DISTINCT FROM o.moving_to
    AND a.blocked = o.blocked

-- piece: fingerprint_as_seen
-- The fingerprint as it was before nodes were activated by this plan.
(
    SELECT encode(sha256(convert_to(concat(
        json_agg(json_build_array(f.name, f.incarnation,
                CASE WHEN f.name = ANY(%(activate)s::text[]) AND f.state = 'active' THEN 'joining'
                    ELSE f.state END,
                float8send(f.weight))
            ORDER BY f.name)::text,
        c.lock_version, {named_groups}), 'UTF8')), 'hex')
    FROM {node} AS f)

-- name: read
-- All rows, in order.
SELECT lower(tokens), upper(tokens), node, moving, moving_to, blocked, version
FROM {ring} ORDER BY tokens

-- name: replace
-- Deletes the rows that go, and changes in place those that keep their tokens: that costs no index.
-- A row for each that was still as it was read; of deleted ones since when their owner had them.
WITH o AS MATERIALIZED (
    SELECT * FROM unnest(
            %(lo)s::int[], %(hi)s::int[], %(node)s::text[], %(moving)s::bool[], %(to)s::text[],
            %(blocked)s::bool[], %(versions)s::bigint[], %(keeps)s::bool[], %(new_node)s::text[],
            %(new_moving)s::bool[], %(new_to)s::text[], %(new_blocked)s::bool[])
        AS o (lo, hi, node, moving, moving_to, blocked, version, keeps, new_node, new_moving,
            new_to, new_blocked)
), changed AS (
    UPDATE {ring} AS a
    SET node = o.new_node, moving = o.new_moving, moving_to = o.new_to, blocked = o.new_blocked,
        version = %(version)s,
        assigned_at = CASE WHEN o.new_node IS NOT DISTINCT FROM a.node THEN a.assigned_at
            ELSE now() END
    FROM o WHERE o.keeps AND {same} RETURNING NULL::int, NULL::text
), deleted AS (
    DELETE FROM {ring} AS a USING o WHERE NOT o.keeps AND {same}
    RETURNING lower(a.tokens), a.assigned_at::text
)
SELECT * FROM changed UNION ALL SELECT * FROM deleted

-- name: insert
-- Adds rows: those of the plain Job's tokens where nodes of every version see them.
WITH fresh AS MATERIALIZED (
    SELECT int4range(lo, hi) AS tokens, node, moving, moving_to, blocked, version,
        coalesce(since, now()) AS assigned_at
    FROM unnest(
            %(lo)s::int[], %(hi)s::int[], %(node)s::text[], %(moving)s::bool[], %(to)s::text[],
            %(blocked)s::bool[], %(versions)s::bigint[], %(since)s::timestamptz[])
        AS t (lo, hi, node, moving, moving_to, blocked, version, since)
), plain AS (
    INSERT INTO {assignment} (tokens, node, moving, moving_to, blocked, version, assigned_at)
    SELECT * FROM fresh WHERE lower(tokens) < 1 << 20
)
INSERT INTO {ring} (tokens, node, moving, moving_to, blocked, version, assigned_at)
SELECT * FROM fresh WHERE lower(tokens) >= 1 << 20

-- name: conclude
-- Lets nodes take part, raises the cluster's version, and after the last piece says that the plan is
-- made, and which queue groups have rows; the fingerprint now, and whether what the plan was made
-- from is still so.
UPDATE {node} SET state = 'active' WHERE name = ANY(%(activate)s::text[]) AND state = 'joining';
UPDATE {cluster} AS c SET
    version = %(version)s,
    planned = CASE WHEN %(last)s AND {fingerprint_as_seen} = %(seen)s THEN {fingerprint} END;
UPDATE {queue_group} SET formed = NOT formed
WHERE %(last)s AND formed <> (id = ANY(%(formed)s::int[]));
SELECT {fingerprint}, {fingerprint_as_seen} = %(seen)s FROM {cluster} AS c
