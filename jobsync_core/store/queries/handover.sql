-- Tokens that change hands: what their former owner promises, and what their new one asks first.

-- piece: promising
-- Records tasks that the owner of their tokens has said yes to as claims that are only promised.
INSERT INTO {claim} AS c (node, task_id, created_on, date, token, incarnation, promised)
SELECT DISTINCT ON (w.task_id) n.name, w.task_id, now(), %(date)s::date, w.token, n.incarnation,
    true
FROM unnest(%(texts)s::text[], %(tokens)s::int[]) AS w (task_id, token)
    JOIN {node} AS n ON n.name = %(name)s AND n.incarnation = %(incarnation)s
    JOIN {assignment} AS a ON a.tokens @> w.token AND a.node = n.name
WHERE NOT EXISTS (
    SELECT FROM {audit} AS d
    WHERE d.task_id = w.task_id AND d.date = %(date)s
        AND d.epoch >= (SELECT epoch FROM {cluster}))
ORDER BY w.task_id
ON CONFLICT (task_id, date) DO UPDATE SET
    node = excluded.node, created_on = excluded.created_on, token = excluded.token,
    incarnation = excluded.incarnation, promised = true, child = NULL
WHERE NOT EXISTS (
    SELECT FROM {node} AS n WHERE n.name = c.node AND n.incarnation = c.incarnation)

-- piece: given_ranges
-- The tokens that are given, as a multirange.
(SELECT range_agg(int4range(r.lo, r.hi))
    FROM unnest(%(los)s::int[], %(his)s::int[]) AS r (lo, hi))

-- piece: cutting
-- Cuts rows of which a part is given, and the rest is not yet: it is in use.
WITH cut AS (
    DELETE FROM {ring} AS a USING {node} AS me
    WHERE me.name = %(name)s AND me.incarnation = %(incarnation)s AND a.node = me.name
        AND a.moving AND a.version <= %(version)s
        AND a.tokens && {given_ranges} AND NOT a.tokens <@ {given_ranges}
    RETURNING a.tokens, a.node, a.moving, a.moving_to, a.blocked, a.version, a.assigned_at
), pieces AS MATERIALIZED (
    SELECT p.tokens, cut.node, cut.moving, cut.moving_to, cut.blocked, cut.version,
        cut.assigned_at
    FROM cut CROSS JOIN LATERAL (
        SELECT unnest(int4multirange(cut.tokens) * {given_ranges}) AS tokens
        UNION ALL SELECT unnest(int4multirange(cut.tokens) - {given_ranges})) AS p
), plain AS (
    INSERT INTO {assignment} (tokens, node, moving, moving_to, blocked, version, assigned_at)
    SELECT * FROM pieces WHERE lower(tokens) < 1 << 20
)
INSERT INTO {ring} (tokens, node, moving, moving_to, blocked, version, assigned_at)
SELECT * FROM pieces WHERE lower(tokens) >= 1 << 20

-- piece: giving
-- Gives tokens of a node to where the plan wants them; whether the node is registered, and how many.
WITH me AS (
    SELECT name FROM {node} WHERE name = %(name)s AND incarnation = %(incarnation)s
), given AS (
    UPDATE {ring} AS a
    SET node = a.moving_to, moving = false, moving_to = NULL, blocked = a.moving_to IS NULL,
        version = c.version + 1, assigned_at = now()
    FROM {cluster} AS c, me
    WHERE a.node = me.name AND a.moving AND (a.moving_to IS NOT NULL OR a.blocked)
        AND a.version <= %(version)s
        AND a.tokens <@ {given_ranges}
    RETURNING a.tokens, a.node
), bumped AS (
    UPDATE {cluster} SET version = version + 1 WHERE EXISTS (SELECT FROM given) RETURNING version
), told AS (
    SELECT tokens,
        CASE WHEN octet_length(names) > %(notify_bytes)s THEN '' ELSE names END AS names
    FROM (
        SELECT sum(upper(tokens) - lower(tokens))::bigint AS tokens,
            coalesce(string_agg(DISTINCT node, ','), '') AS names
        FROM given) AS g
), sent AS (
    SELECT pg_notify(%(channel)s, rtrim('give ' || told.names))::text AS payload FROM told, bumped
)
SELECT EXISTS (SELECT FROM me), coalesce(told.tokens, 0), (SELECT count(payload) FROM sent)
FROM told

-- name: give
-- Gives tokens.
{take_turn};
{cutting};
{giving}

-- name: promise_and_give
-- Gives tokens, and records before what their owner has promised.
{take_turn};
{promising};
{cutting};
{giving}

-- name: lives_gone
-- Which of these incarnations are no longer in the node table.
SELECT life FROM unnest(%(lives)s::text[]) AS life
WHERE NOT EXISTS (SELECT FROM {node} AS n WHERE n.incarnation = life)

-- piece: asked
-- Whether an audit or a claim is for a token that is asked for.
date = %(date)s AND token >= %(first)s AND token < {stop} AND token <@ %(ranges)s::int4multirange

-- piece: stop
-- The token before which rows are read: where there are not many more than the limit.
(SELECT stop FROM bound)

-- piece: taken
-- Tasks that are audited or claimed. Only audits of the present epoch count, and only claims of nodes
-- that live: of others than this one, as it knows its own.
SELECT token, task_id, NULL AS life, false AS promised FROM {audit}
WHERE {asked} AND epoch >= (SELECT epoch FROM {cluster})
UNION ALL
SELECT c.token, c.task_id, c.incarnation, c.promised
FROM {claim} AS c JOIN {node} AS n ON n.name = c.node AND n.incarnation = c.incarnation
WHERE {asked} AND c.node <> %(name)s

-- piece: exclusion
-- What Exclusions computes: the token, and the first bits of the task's SHA-256 behind it, in 8 bytes.
int8send(((token::bigint::bit(64) << %(shift)s)
    | (('x' || left(encode(sha256(convert_to(task_id, 'UTF8')), 'hex'), 16))::bit(64)
        >> %(bits)s))::bigint)

-- name: take
-- What is taken of the first tokens that are asked for, made of about `limit` rows: up to which token,
-- whether some audits lack their token, and the tasks.
WITH bound AS MATERIALIZED (
    SELECT least(
        %(end)s,
        (SELECT token FROM {audit}
            WHERE date = %(date)s AND token >= %(first)s AND token < %(end)s
            ORDER BY token OFFSET %(limit)s LIMIT 1),
        (SELECT token FROM {claim}
            WHERE date = %(date)s AND token >= %(first)s AND token < %(end)s
            ORDER BY token OFFSET %(limit)s LIMIT 1)) AS stop
), found AS (
    {taken}
)
SELECT bound.stop, EXISTS (SELECT FROM {audit} WHERE date = %(date)s AND token IS NULL), told.*
FROM bound, (
    SELECT coalesce(string_agg({exclusion}, '' ORDER BY {exclusion}), ''),
        array_agg(DISTINCT life) FILTER (WHERE life IS NOT NULL),
        array_agg(DISTINCT token) FILTER (WHERE promised)
    FROM found) AS told

-- name: take_part
-- What is taken of one token that has more rows than the limit, in the order of its tasks.
WITH found AS (
    SELECT * FROM ({taken}) AS all_of_it
    WHERE %(after)s::text IS NULL OR task_id > %(after)s
    ORDER BY task_id LIMIT %(limit)s
)
SELECT coalesce(string_agg({exclusion}, '' ORDER BY {exclusion}), ''),
    array_agg(DISTINCT life) FILTER (WHERE life IS NOT NULL), bool_or(promised), count(*),
    max(task_id)
FROM found

-- name: without_token
-- Some audits of a date whose writer did not know the token.
SELECT task_id FROM {audit} WHERE date = %(date)s AND token IS NULL LIMIT %(limit)s

-- name: fill_in
-- Writes their tokens.
WITH mine AS (
    SELECT a.task_id, w.token
    FROM unnest(%(texts)s::text[], %(tokens)s::int[]) AS w (task_id, token)
        JOIN {audit} AS a ON a.task_id = w.task_id AND a.date = %(date)s
    WHERE a.token IS NULL ORDER BY a.task_id FOR UPDATE OF a
)
UPDATE {audit} AS a SET token = mine.token FROM mine
WHERE a.task_id = mine.task_id AND a.date = %(date)s
