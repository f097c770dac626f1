-- What a node's role needs in the database.

-- name: lacking
-- Which of these rights a role, or this user, does not have. By the catalogs, not by to_regclass(),
-- which asks for rights itself; a column named in each test, as an unknown name would be an error.
SELECT w.number
FROM unnest(
        %(privileges)s::text[], %(kinds)s::text[], %(schemas)s::text[], %(names)s::text[],
        %(arguments)s::text[])
    WITH ORDINALITY AS w (privilege, kind, schema, name, arguments, number)
    CROSS JOIN (
        SELECT r.oid FROM pg_roles AS r WHERE r.rolname = coalesce(%(role)s, current_user)) AS role
WHERE NOT CASE w.kind
    WHEN 'DATABASE' THEN EXISTS (
        SELECT FROM pg_database AS d
        WHERE d.datname = current_database()
            AND has_database_privilege(role.oid, d.oid, w.privilege))
    WHEN 'SCHEMA' THEN EXISTS (
        SELECT FROM pg_namespace AS n
        WHERE n.nspname = w.name AND has_schema_privilege(role.oid, n.oid, w.privilege))
    WHEN 'TABLE' THEN EXISTS (
        SELECT FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
        WHERE n.nspname = w.schema AND c.relname = w.name
            AND has_table_privilege(role.oid, c.oid, w.privilege))
    ELSE EXISTS (
        SELECT FROM pg_proc AS p JOIN pg_namespace AS n ON n.oid = p.pronamespace
        WHERE n.nspname = w.schema AND p.proname = w.name
            AND oidvectortypes(p.proargtypes) = w.arguments
            AND has_function_privilege(role.oid, p.oid, w.privilege))
    END
ORDER BY w.number

-- name: policies
-- Tables of which row-level security hides rows from this role.
SELECT c.relname FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
WHERE n.nspname = %(schema)s AND starts_with(c.relname, %(prefix)s) AND c.relrowsecurity
    AND row_security_active(c.oid)
ORDER BY 1

-- name: database
-- The database's own name: a pooler may know it by another one.
SELECT current_database()
