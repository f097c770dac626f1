-- Version 10: queue groups, each with a ring of tokens of its own, and queues of nodes for each home queue.

-- Each group's place on the number line: its tokens are those from id * 1048576 on. formed: a plan has written its rows, so that tokens
-- without a row are missing rows. Group 0 is the plain Job's, and has no row here.
CREATE TABLE IF NOT EXISTS {queue_group} (
    id integer PRIMARY KEY CONSTRAINT at_most_2047_queue_groups CHECK (id BETWEEN 1 AND 2047),
    name text COLLATE "C" NOT NULL UNIQUE,
    formed boolean NOT NULL DEFAULT false
);

-- Who owns which tokens of queue groups. The assignment of group 0 is a part of it: who reads or changes this table reads or changes both, and
-- nodes of earlier versions, which know the other one alone, cannot delete what they do not know.
CREATE TABLE IF NOT EXISTS {ring} (
    tokens int4range NOT NULL,
    node text COLLATE "C" REFERENCES {node} ON DELETE SET NULL,
    moving boolean NOT NULL DEFAULT false,
    moving_to text COLLATE "C" REFERENCES {node} ON DELETE SET NULL,
    blocked boolean NOT NULL DEFAULT false,
    version bigint NOT NULL,
    assigned_at timestamptz NOT NULL DEFAULT now(),
    CHECK (lower(tokens) >= 1048576 AND NOT isempty(tokens) AND NOT upper_inf(tokens)) NO INHERIT,
    EXCLUDE USING spgist (tokens WITH &&)
) WITH (autovacuum_vacuum_scale_factor = 0.05, autovacuum_vacuum_threshold = 1000, autovacuum_vacuum_cost_delay = 0);
DO $inherit$ BEGIN
    ALTER TABLE {assignment} INHERIT {ring};
EXCEPTION WHEN duplicate_table THEN NULL; -- it does already
END $inherit$;

-- One row per owned token of a queue group; token_id as tasks hash to it.
CREATE OR REPLACE VIEW {group_token} AS
    SELECT g.name AS queue_group, token - (g.id << 20) AS token_id, r.node, r.assigned_at, r.version
    FROM {ring} AS r JOIN {queue_group} AS g ON g.id = lower(r.tokens) >> 20
        CROSS JOIN LATERAL generate_series(lower(r.tokens), upper(r.tokens) - 1) AS token
    WHERE r.node IS NOT NULL;

-- Queues of nodes, one for each home queue that a node consumes; what a node belongs to stands in a row with home '' and name ''.
CREATE TABLE IF NOT EXISTS {node_queue} (
    node text COLLATE "C" NOT NULL,
    home text COLLATE "C" NOT NULL,
    name text COLLATE "C" NOT NULL,
    kind text NOT NULL DEFAULT '',
    broker text NOT NULL DEFAULT '',
    place text NOT NULL DEFAULT '',
    application text NOT NULL DEFAULT '',
    created_at timestamptz NOT NULL DEFAULT now(),
    gone_at timestamptz,
    -- the queue group of the home queue by this node's settings; '' where it has not said
    queue_group text COLLATE "C" NOT NULL DEFAULT '',
    PRIMARY KEY (node, home)
);

-- The queue group in which a lock counts; NULL: it counts in all.
ALTER TABLE {lock} ADD COLUMN IF NOT EXISTS queue text COLLATE "C";
-- Names of the node's queue groups, in order; NULL: the node is of an earlier version, and knows of none.
ALTER TABLE {node} ADD COLUMN IF NOT EXISTS groups text[] COLLATE "C";
-- The node was drained by an operator or its program, who alone take it back; not by itself, for as long as it is cut off from its broker.
ALTER TABLE {node} ADD COLUMN IF NOT EXISTS held boolean NOT NULL DEFAULT false;
-- The node has not reached its broker for a while, by what it finds itself.
ALTER TABLE {node} ADD COLUMN IF NOT EXISTS silent boolean NOT NULL DEFAULT false;

UPDATE {cluster} SET schema_version = 10 WHERE schema_version < 10;
