-- What stands in the database under a cluster's names, and how it is brought up to date.

-- name: limit
-- What the statements of the transaction may take.
SELECT set_config('lock_timeout', %(lock)s, true),
    set_config('statement_timeout', %(statement)s, true)

-- name: limit_locks
-- How long the further statements of the transaction may wait for a lock.
SELECT set_config('lock_timeout', %(lock)s, true)

-- name: wait_for_turn
-- Takes the cluster's lock: no leader plans while tables change.
SELECT true FROM pg_advisory_xact_lock(%(first)s, %(second)s)

-- name: try_for_turn
-- The same, but it does not wait; whether it has the lock.
SELECT pg_try_advisory_xact_lock(%(first)s, %(second)s)

-- name: has_place
-- Whether the schema is there.
SELECT EXISTS (SELECT FROM pg_namespace WHERE nspname = %(schema)s)

-- name: create_place
-- Creates the schema.
CREATE SCHEMA IF NOT EXISTS {schema}

-- name: version
-- The version of the tables.
SELECT max(schema_version) FROM {cluster}

-- name: raise_version
-- Records that the tables have a version.
UPDATE {cluster} SET schema_version = %(version)s WHERE schema_version < %(version)s

-- name: settle
-- Writes what all nodes of a new cluster have in common.
UPDATE {cluster} SET total_tokens = %(total_tokens)s, hash_function = %(hash_function)s,
    scope = %(scope)s

-- name: relations
-- Kind and columns of each relation; '' where it does not exist.
SELECT wanted.name, coalesce(c.relkind::text, ''), coalesce(string_agg(a.attname, ' '), '')
FROM unnest(%(names)s::text[]) AS wanted (name)
LEFT JOIN pg_class AS c ON c.oid = to_regclass(wanted.name)
LEFT JOIN pg_attribute AS a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
GROUP BY wanted.name, c.relkind

-- name: has_functions
-- Whether all functions are there, and this role may call them.
SELECT bool_and(coalesce(
    has_function_privilege(to_regprocedure(wanted.name), 'EXECUTE'), false))
FROM unnest(%(signatures)s::text[]) AS wanted (name)
