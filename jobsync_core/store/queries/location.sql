-- Where a cluster's tables are.

-- piece: pinned_path
-- The path of JobSync's own statements. pg_temp is named so that it comes last: unnamed, it would
-- come first.
pg_catalog, pg_temp

-- name: roles_path
-- The schemas of the role's own path, the path as it is written, and the role.
SET LOCAL search_path TO DEFAULT;
SELECT pg_catalog.current_schemas(false)::pg_catalog.text[],
    pg_catalog.current_setting('search_path'), current_user::pg_catalog.text

-- name: find
-- The schema, of several ones, that has the tables, and whether its cluster has a scope that this
-- role may read. One whose table belongs to this role, to a superuser or to the database's owner
-- comes first: whoever may create things in a schema at the beginning of the path cannot put other
-- tables in the place of those that are there.
SET LOCAL search_path TO {pinned_path};
SELECT s.name,
    EXISTS (SELECT FROM pg_attribute AS a WHERE a.attrelid = c.oid AND a.attname = 'scope'
        AND NOT a.attisdropped)
    AND has_schema_privilege(n.oid, 'USAGE') AND has_table_privilege(c.oid, 'SELECT')
FROM unnest(%s::text[]) WITH ORDINALITY AS s (name, place)
    JOIN pg_namespace AS n ON n.nspname = s.name
    JOIN pg_class AS c ON c.relnamespace = n.oid AND c.relname = %s
    JOIN pg_roles AS o ON o.oid = c.relowner
    JOIN pg_roles AS me ON me.rolname = current_user
ORDER BY NOT (o.rolsuper OR o.oid = me.oid OR (NOT me.rolsuper AND pg_has_role(o.oid, 'MEMBER'))
    OR o.oid = (SELECT d.datdba FROM pg_database AS d WHERE d.datname = current_database())),
    s.place
LIMIT 1

-- name: scope
-- The scope of the cluster whose table that is.
SET LOCAL search_path TO {pinned_path};
SELECT scope FROM {cluster}
