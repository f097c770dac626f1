-- Questions about the server itself, for `jobsync doctor`.

-- name: server_version
-- The server's version as a number and as text.
SELECT current_setting('server_version_num')::int, 'PostgreSQL ' || current_setting('server_version')

-- name: read_only
-- Whether the server is a standby, and whether transactions are read-only.
SELECT pg_is_in_recovery(), current_setting('transaction_read_only')

-- name: write
-- Writes a row of a quarter of a megabyte, which takes new pages of the disk.
INSERT INTO {execution} (key, state, fence, error)
SELECT 'jobsync doctor ' || gen_random_uuid(), 'failed', 1,
    string_agg(gen_random_uuid()::text, '')
FROM generate_series(1, 7000)

-- name: patterns
-- The different patterns of locks in force, but those that are too long.
SELECT DISTINCT node_patterns::text FROM {lock}
WHERE octet_length(node_patterns::text) <= %(size)s AND ({in_force})

-- name: bad_locks
-- Tasks whose lock in force has one of these patterns, or is too long.
SELECT task_id FROM {lock}
WHERE (octet_length(node_patterns::text) > %(size)s
        OR node_patterns::text = ANY(%(patterns)s::text[]) OR octet_length(task_id) > 2000)
    AND ({in_force})
ORDER BY task_id

-- name: clock
-- The server's clock.
SELECT extract(epoch FROM clock_timestamp())::float8

-- name: relations
-- What there is in a schema. By the catalog, which everybody may read.
SELECT c.relname FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
WHERE n.nspname = %(schema)s

-- name: schema_version
-- The version of the tables.
SELECT schema_version FROM {cluster}

-- name: may_create
-- Whether this user may create tables in a schema, or the schema.
SELECT CASE WHEN EXISTS (SELECT FROM pg_namespace WHERE nspname = %(schema)s)
    THEN (
        SELECT has_schema_privilege(oid, 'USAGE') AND has_schema_privilege(oid, 'CREATE')
        FROM pg_namespace WHERE nspname = %(schema)s)
    ELSE has_database_privilege(current_database(), 'CREATE') END

-- name: everybody_creates
-- Whether every role of the server may create things in a schema.
SELECT EXISTS (
    SELECT FROM pg_namespace AS n CROSS JOIN LATERAL aclexplode(n.nspacl) AS a
    WHERE n.nspname = %(schema)s AND a.grantee = 0 AND a.privilege_type = 'CREATE')

-- name: not_callable
-- Those of these functions that this user may not call.
SELECT name FROM unnest(%(functions)s) AS f (name)
WHERE NOT has_function_privilege(to_regprocedure(name), 'EXECUTE')

-- name: superuser
-- Whether this user may do everything.
SELECT rolsuper FROM pg_roles WHERE rolname = current_user

-- name: replication
-- How commits reach standbys.
SELECT current_setting('synchronous_standby_names'),
    (SELECT count(*)::int FROM pg_stat_replication), current_setting('fsync') = 'on'

-- name: notify
-- Sends a notification when the transaction commits.
SELECT pg_notify(%(channel)s, %(payload)s)

-- name: backend
-- The server's process.
SELECT pg_backend_pid()
