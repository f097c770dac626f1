-- The ledger's rows: one per key, with the fence that only its newest attempt holds.

-- piece: found
-- What the function found. The result as text: the driver would read a document while it reads the
-- rows of all keys of a batch, and one that it cannot read, as somebody has written it by hand, would
-- fail them all.
f.began, f.registered, f.state, f.free, f.fence, f.attempts, f.result::text, f.node, f.incarnation,
    f.host, f.boot_id, f.pid_namespace, f.pid, f.started, f.lost, f.dead

-- name: begin
-- Takes a key, if it is free; what was found. A key whose row is locked is waited for only shortly:
-- whoever holds it is about to complete it, or will not soon.
SELECT pg_catalog.set_config('lock_timeout', %(wait)s, true);
SELECT {found} FROM {begin_attempt}(
    %(key)s, %(node)s, %(incarnation)s, %(host)s, %(boot_id)s, %(pid_namespace)s, %(pid)s,
    %(started)s, %(max_lost)s) AS f

-- piece: hardly_wait
-- Several keys in one transaction hardly wait for any other, since all of them wait then.
SELECT set_config('lock_timeout', '100ms', true)

-- name: begin_many
-- The same for several keys in one transaction. Each function call has a snapshot of its own, as if
-- it came alone. The keys come in order, so that two such transactions never wait for each other in a
-- ring.
{hardly_wait};
SELECT wanted.number, {found}
FROM unnest(%(keys)s::text[], %(limits)s::integer[]) WITH ORDINALITY
        AS wanted (key, max_lost, number),
    {begin_attempt}(
        wanted.key, %(node)s, %(incarnation)s, %(host)s, %(boot_id)s, %(pid_namespace)s, %(pid)s,
        %(started)s, wanted.max_lost) AS f

-- name: finish
-- Records a completion, again if need be; a row, or none where another attempt holds the key.
SELECT FROM {finish_execution}(%(result)s, %(retention)s, %(key)s, %(fence)s) AS finished
WHERE finished

-- name: finish_many
-- The same for several keys in one transaction, in their order.
{hardly_wait};
SELECT done.number,
    {finish_execution}(done.result::jsonb, done.retention, done.key, done.fence)
FROM unnest(
        %(results)s::text[], %(retentions)s::double precision[], %(keys)s::text[],
        %(fences)s::bigint[])
    WITH ORDINALITY AS done (result, retention, key, fence, number)

-- piece: filing
-- An attempt that has ended is filed among the earlier ones of its key, in the statement that ends it.
INSERT INTO {attempt}
    (key, slot, number, fence, outcome, node, incarnation, host, pid, started_at, ended_at, error,
        expires_at)

-- piece: in_its_slot
-- In place of the one a hundred before.
ON CONFLICT (key, slot) DO UPDATE SET
    number = excluded.number, fence = excluded.fence, outcome = excluded.outcome,
    node = excluded.node, incarnation = excluded.incarnation, host = excluded.host,
    pid = excluded.pid, started_at = excluded.started_at, ended_at = excluded.ended_at,
    error = excluded.error, expires_at = excluded.expires_at

-- name: take_over
-- Takes a running key whose holder is dead, if its fence is still the same. It was lost, unless it is
-- the taker's own, whose begin was not answered: that one has not run.
WITH former AS (
    SELECT * FROM {execution} WHERE key = %(key)s AND fence = %(fence)s
), taken AS (
    UPDATE {execution} AS e
    SET node = me.name, incarnation = me.incarnation, host = %(host)s, boot_id = %(boot_id)s,
        pid_namespace = %(pid_namespace)s, pid = %(pid)s, started = %(started)s,
        fence = greatest(e.fence + 1, pg_current_xact_id()::text::bigint),
        attempts = e.attempts + 1, started_at = now(),
        lost = e.lost + CASE WHEN %(lost)s THEN 1 ELSE 0 END
    FROM {node} AS me
    WHERE e.key = %(key)s AND e.fence = %(fence)s AND e.state = 'running' AND me.name = %(node)s
        AND me.incarnation = %(incarnation)s
    RETURNING e.fence, e.attempts
), filed AS (
    {filing}
    SELECT f.key, mod(f.attempts, 100), f.attempts, f.fence, 'lost', f.node, f.incarnation, f.host,
        f.pid, f.started_at, now(), 'its process was gone: ' || %(node)s || ' took the key over',
        now() + interval '7 days'
    FROM former AS f WHERE %(lost)s AND EXISTS (SELECT FROM taken)
    {in_its_slot}
)
SELECT fence, attempts FROM taken

-- name: bury
-- Has a running key be dead whose holder is dead, if its fence is still the same; whether it did.
SELECT {bury_key}(%(key)s, %(fence)s, 'running', %(node)s)

-- name: keep
-- Keeps the message of a dead key; the first one that comes.
UPDATE {execution} SET message = coalesce(message, CAST(%(message)s AS jsonb))
WHERE key = %(key)s AND state = 'dead'

-- piece: completing
-- Completes a key in a transaction of the user's. Only a running attempt becomes complete there: with
-- 'done' accepted, one that tries again after a commit whose answer was lost would write its effect
-- twice. The setting tells that this very transaction has completed it before. clock_timestamp(),
-- because the transaction may be older than the attempt. Every name and operator is qualified: the
-- search_path is the user's here, and others may create things along it. The parameters are given by
-- their order, which every driver knows.
UPDATE {execution}
SET state = 'done', result = CAST(%s AS pg_catalog.jsonb), error = NULL,
    finished_at = pg_catalog.clock_timestamp(),
    expires_at = pg_catalog.clock_timestamp()
        OPERATOR(pg_catalog.+) pg_catalog.make_interval(secs => CAST(%s AS double precision))
WHERE key OPERATOR(pg_catalog.=) %s AND fence OPERATOR(pg_catalog.=) %s
    AND (state OPERATOR(pg_catalog.=) 'running'
        OR (state OPERATOR(pg_catalog.=) 'done'
            AND pg_catalog.current_setting('jobsync.completed', true) OPERATOR(pg_catalog.=) %s))

-- name: mark
-- Marks a transaction of the user's by a setting: in autocommit mode it is gone when the next
-- statement comes.
SELECT pg_catalog.set_config('jobsync.completing', %s, true)

-- name: complete_if_marked
-- Completes a key on a connection of the user's; a row where it did.
{completing}
    AND pg_catalog.current_setting('jobsync.completing', true) OPERATOR(pg_catalog.=) %s
RETURNING pg_catalog.set_config('jobsync.completed', %s, true)

-- name: is_marked
-- Whether the transaction is the one that was marked.
SELECT 1 WHERE pg_catalog.current_setting('jobsync.completing', true) OPERATOR(pg_catalog.=) %s

-- piece: stamp
-- A transaction is known by its beginning; another one has another, whatever was set or reset in it.
CAST(pg_catalog.date_part('epoch', pg_catalog.now()) OPERATOR(pg_catalog.*) 1000000 AS bigint)

-- name: begin_transaction
-- Begins a transaction of the user's: without the limits of short calls, and known.
SELECT pg_catalog.set_config('statement_timeout', '0', true),
    pg_catalog.set_config('lock_timeout', '0', true),
    pg_catalog.set_config('idle_in_transaction_session_timeout', %(idle)s, true),
    {stamp}, pg_catalog.pg_backend_pid()

-- name: which_transaction
-- By what the transaction is known.
SELECT {stamp}, pg_catalog.pg_backend_pid()

-- name: complete_if_same
-- Completes a key at the end of a transaction of the user's, if it is still the same. First of all his
-- time limit is lifted, which holds for the statement that lifts it only. Constraints that were
-- deferred are checked, and triggers run, as the user has set things up; then whatever he has set is
-- undone, for the completion and the commit, and for the next user of the connection, behind a pooler
-- as well. From here on the key's row is locked: a process that is stopped before its commit must not
-- keep it.
SET LOCAL statement_timeout TO 0; SET CONSTRAINTS ALL IMMEDIATE; RESET SESSION AUTHORIZATION;
RESET ROLE; RESET ALL;
SET LOCAL search_path TO {pinned_path}; SET LOCAL synchronous_commit TO 'on';
SET LOCAL statement_timeout TO 0;
SET LOCAL lock_timeout TO %s; SET LOCAL idle_in_transaction_session_timeout TO %s;
{completing}
    AND {stamp} OPERATOR(pg_catalog.=) %s
    AND pg_catalog.pg_backend_pid() OPERATOR(pg_catalog.=) %s

-- name: stored
-- State and result of an attempt's row.
SELECT state, result::text FROM {execution} WHERE key = %(key)s AND fence = %(fence)s

-- name: state
-- State of a key's row, without waiting for whoever has locked it.
SELECT state FROM {execution} WHERE key = %(key)s

-- name: has_prefix
-- Whether there is any key in a range.
SELECT EXISTS (SELECT FROM {execution} WHERE key >= %(first)s AND key < %(end)s)

-- piece: is_held
-- Whether the node that made the attempt lives.
EXISTS (SELECT FROM {node} AS n WHERE n.name = e.node AND n.incarnation = e.incarnation)

-- name: find
-- The first of these keys that is complete, else one that a live node holds ('done' comes before
-- 'running'). Those that are old count only where an earlier version began them.
SELECT CASE WHEN e.result = %(pending)s::jsonb AND {is_held} THEN 'running' ELSE e.state END,
    e.result::text
FROM {execution} AS e
WHERE e.key = ANY(%(keys)s::text[])
    AND (e.key <> ALL(%(old)s::text[])
        OR e.fence < (SELECT max(c.former_until) FROM {cluster} AS c))
    AND CASE e.state
        WHEN 'done' THEN e.expires_at IS NULL OR e.expires_at > now()
        WHEN 'running' THEN {is_held}
        ELSE false END
ORDER BY e.state LIMIT 1

-- name: late_result
-- The result of an attempt's row, and whether its node lives.
SELECT e.result::text, {is_held} FROM {execution} AS e
WHERE e.key = %(key)s AND e.fence = %(fence)s

-- name: put_result
-- Stores the result of a completion that carried none, or that there is none.
UPDATE {execution} SET result = CAST(%(result)s AS jsonb)
WHERE key = %(key)s AND fence = %(fence)s AND state = 'done'
    AND (result IS NULL OR result = CAST(%(pending)s AS jsonb))

-- name: settle
-- Ends an attempt that did not complete; the state that it is in now. SKIP LOCKED: whoever holds the
-- row's lock is a transaction that is about to complete the key, or to roll that back.
WITH loose AS (
    SELECT key FROM {execution}
    WHERE key = %(key)s AND fence = %(fence)s AND state = 'running' FOR UPDATE SKIP LOCKED
), failed AS (
    UPDATE {execution} AS e
    SET state = 'failed', error = %(error)s, finished_at = now(),
        expires_at = now() + make_interval(secs => %(retention)s)
    FROM loose WHERE e.key = loose.key
    RETURNING e.*
), filed AS (
    {filing}
    SELECT f.key, mod(f.attempts, 100), f.attempts, f.fence, 'failed', f.node, f.incarnation, f.host,
        f.pid, f.started_at, f.finished_at, f.error, f.expires_at
    FROM failed AS f
    {in_its_slot}
)
SELECT CASE WHEN EXISTS (SELECT FROM failed) THEN 'failed' ELSE e.state END
FROM {execution} AS e WHERE e.key = %(key)s AND e.fence = %(fence)s

-- name: release
-- Lets others take over what a process was running, which was lost with it, or its one key, which may
-- not have begun; how many keys.
WITH failed AS (
    UPDATE {execution}
    SET state = 'failed', error = %(error)s, finished_at = now(),
        expires_at = now() + make_interval(secs => %(retention)s),
        lost = lost + CASE WHEN %(key)s::text IS NULL THEN 1 ELSE 0 END
    WHERE state = 'running' AND node = %(node)s AND incarnation = %(incarnation)s AND pid = %(pid)s
        AND (%(key)s::text IS NULL OR key = %(key)s)
    RETURNING *
), filed AS (
    {filing}
    SELECT f.key, mod(f.attempts, 100), f.attempts, f.fence,
        CASE WHEN %(key)s::text IS NULL THEN 'lost' ELSE 'failed' END, f.node, f.incarnation,
        f.host, f.pid, f.started_at, f.finished_at, f.error, f.expires_at
    FROM failed AS f
    {in_its_slot}
)
SELECT count(*) FROM failed
