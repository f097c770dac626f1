-- Which tasks nodes have begun for a date, and which they have finished.

-- piece: counts
-- Whether the audit row `a` is of the cluster that lives, and not of one that has ended.
a.epoch >= (SELECT k.epoch FROM {cluster} AS k)

-- piece: on_audited
-- An audit row `a` of a cluster that has ended gives way.
ON CONFLICT (task_id, date) DO UPDATE SET
    created_on = excluded.created_on, node = excluded.node, token = excluded.token,
    epoch = excluded.epoch
WHERE a.epoch < excluded.epoch

-- name: claim
-- Takes tasks for a life of a node; those that are its own now. The audit is looked at twice: an old
-- owner that audits while this waits for its claim row shows only to a statement that begins
-- afterwards.
WITH wanted AS MATERIALIZED (
    SELECT DISTINCT w.task_id, w.token
    FROM unnest(%(task_ids)s::text[], %(tokens)s::int[]) AS w (task_id, token)
    WHERE NOT EXISTS (
        SELECT FROM {audit} AS a WHERE a.task_id = w.task_id AND a.date = %(date)s AND {counts})
), mine AS MATERIALIZED (
    SELECT w.task_id, w.token FROM wanted AS w JOIN {assignment} AS a ON a.tokens @> w.token
    WHERE a.node = %(node)s
        AND EXISTS (
            SELECT FROM {node} AS n WHERE n.name = %(node)s AND n.incarnation = %(incarnation)s)
    ORDER BY a.tokens FOR SHARE OF a
)
INSERT INTO {claim} AS c (node, task_id, created_on, date, token, incarnation, child)
SELECT %(node)s, task_id, now(), %(date)s, token, %(incarnation)s, %(child)s
FROM mine ORDER BY task_id
ON CONFLICT (task_id, date) DO UPDATE SET
    node = excluded.node, created_on = excluded.created_on, token = excluded.token,
    incarnation = excluded.incarnation, promised = false, child = excluded.child
WHERE NOT EXISTS (
    SELECT FROM {node} AS n WHERE n.name = c.node AND n.incarnation = c.incarnation);
UPDATE {claim} SET promised = false, child = %(child)s
WHERE task_id = ANY(%(texts)s::text[]) AND date = %(date)s AND node = %(node)s
    AND incarnation = %(incarnation)s AND (promised OR child IS DISTINCT FROM %(child)s);
DELETE FROM {claim} AS c USING {audit} AS a
WHERE c.task_id = ANY(%(texts)s::text[]) AND c.date = %(date)s AND c.node = %(node)s
    AND a.task_id = c.task_id AND a.date = c.date AND {counts};
SELECT c.task_id
FROM {claim} AS c JOIN {node} AS n ON n.name = c.node AND n.incarnation = c.incarnation
WHERE c.task_id = ANY(%(texts)s::text[]) AND c.date = %(date)s AND c.node = %(node)s
    AND c.incarnation = %(incarnation)s
ORDER BY c.task_id

-- name: epoch
-- The cluster's epoch.
SELECT epoch FROM {cluster}

-- name: count_ended
-- How many tasks are audited for a date by clusters that have ended, up to a number.
SELECT count(*) FROM (
    SELECT FROM {audit} AS a WHERE a.date = %(date)s AND NOT ({counts}) LIMIT %(most)s) AS t

-- name: audit
-- Records tasks as finished by a node, and drops its claims on them.
INSERT INTO {audit} AS a (created_on, node, task_id, date, token, epoch)
SELECT now(), %(node)s, task_id, %(date)s, token,
    coalesce(%(epoch)s, (SELECT epoch FROM {cluster}), 0)
FROM unnest(%(texts)s::text[], %(tokens)s::int[]) AS t (task_id, token)
ORDER BY task_id
{on_audited};
DELETE FROM {claim}
WHERE node = %(node)s AND date = %(date)s AND task_id = ANY(%(texts)s::text[])

-- name: audit_children
-- Turns into audits what forked children of a life of a node have taken for that, or one of them;
-- one batch.
WITH done AS (
    DELETE FROM {claim} WHERE (task_id, date) IN (
        SELECT c.task_id, c.date FROM {claim} AS c
        WHERE c.node = %(node)s AND c.incarnation = %(incarnation)s AND c.date = %(date)s
            AND NOT c.promised AND c.child IS NOT NULL
            AND (%(child)s::int IS NULL OR c.child = %(child)s)
        LIMIT %(batch)s FOR UPDATE)
    RETURNING task_id, token
), kept AS (
    INSERT INTO {audit} AS a (created_on, node, task_id, date, token, epoch)
    SELECT now(), %(node)s, task_id, %(date)s, token, (SELECT epoch FROM {cluster})
    FROM done ORDER BY task_id
    {on_audited}
)
SELECT count(*) FROM done

-- name: audits
-- Who finished what for a date, in the order of recording.
SELECT node, task_id FROM {audit} WHERE date = %(date)s ORDER BY created_on, task_id

-- name: latest_audit
-- A task's latest audit: whether it counts, and whether any node is registered.
SELECT node, date, created_on, {counts}, EXISTS (SELECT FROM {node})
FROM {audit} AS a WHERE a.task_id = %(task)s ORDER BY a.date DESC LIMIT 1

-- name: latest_claim
-- A task's latest claim by a node that lives.
SELECT c.node, c.date, c.created_on, c.promised
FROM {claim} AS c JOIN {node} AS n ON n.name = c.node AND n.incarnation = c.incarnation
WHERE c.task_id = %(task)s ORDER BY c.date DESC LIMIT 1

-- name: is_taken
-- Whether a task is audited for a date, or claimed for it by another node that lives.
SELECT EXISTS (
        SELECT FROM {audit} AS a WHERE a.task_id = %(text)s AND a.date = %(date)s AND {counts})
    OR EXISTS (
        SELECT FROM {claim} AS c JOIN {node} AS n
            ON n.name = c.node AND n.incarnation = c.incarnation
        WHERE c.task_id = %(text)s AND c.date = %(date)s AND c.node <> %(node)s)

-- name: release_promise
-- Takes back what a hand-over promised to a life of a node, if it is no claim yet.
DELETE FROM {claim}
WHERE task_id = %(text)s AND date = %(date)s AND node = %(node)s
    AND incarnation = %(incarnation)s AND promised

-- name: release_claims
-- Removes claims of a life of a node: those on these tasks, or all but those that its children took
-- for the audit; one batch.
DELETE FROM {claim} WHERE (task_id, date) IN (
    SELECT task_id, date FROM {claim}
    WHERE node = %(node)s AND incarnation = %(incarnation)s
        AND CASE WHEN %(texts)s::text[] IS NULL THEN child IS NULL
            ELSE task_id = ANY(%(texts)s) END
    LIMIT %(batch)s FOR UPDATE)
