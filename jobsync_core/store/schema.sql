-- The tables of one cluster. Names in braces are replaced by quoted names under the cluster's prefix.

CREATE TABLE {cluster} (
    one            boolean PRIMARY KEY DEFAULT true CHECK (one),
    schema_version integer NOT NULL,
    total_tokens   integer NOT NULL DEFAULT 10000,
    hash_function  text    NOT NULL DEFAULT 'double_sha256',
    version        bigint  NOT NULL DEFAULT 0,  -- counts plans and hand-overs
    lock_version   bigint  NOT NULL DEFAULT 0,  -- counts changes of locks
    planned        text                         -- what the latest plan was made for: nodes and lock_version
) WITH (fillfactor = 50);

-- No index on what a heartbeat changes, and room in each page, so that heartbeats stay within their page.
CREATE TABLE {node} (
    name           text PRIMARY KEY,
    created_on     timestamptz NOT NULL,
    last_heartbeat timestamptz NOT NULL,        -- for people; nothing is decided by it
    beat           bigint NOT NULL DEFAULT 0,   -- counts heartbeats; compared for equality only
    incarnation    text   NOT NULL,
    state          text   NOT NULL CHECK (state IN ('joining', 'active', 'draining')),
    weight         double precision NOT NULL CHECK (weight > 0),
    lease_sec      double precision NOT NULL,
    host           text    NOT NULL,
    boot_id        text    NOT NULL,
    pid_namespace  text    NOT NULL,
    pid            integer NOT NULL,
    started        text    NOT NULL
) WITH (fillfactor = 25);

-- The exclusion constraint makes two owners of a token impossible, whatever a program does.
CREATE TABLE {assignment} (
    tokens      int4range NOT NULL CHECK (NOT isempty(tokens)),
    node        text REFERENCES {node} ON DELETE SET NULL,
    moving      boolean NOT NULL DEFAULT false,
    moving_to   text REFERENCES {node} ON DELETE SET NULL,
    blocked     boolean NOT NULL DEFAULT false,
    version     bigint NOT NULL,
    assigned_at timestamptz NOT NULL DEFAULT now(),
    EXCLUDE USING gist (tokens WITH &&)
);
CREATE INDEX ON {assignment} (node);
CREATE INDEX ON {assignment} (moving_to) WHERE moving_to IS NOT NULL;

CREATE VIEW {token} AS
    SELECT generate_series(lower(tokens), upper(tokens) - 1) AS token_id, node, assigned_at, version
    FROM {assignment} WHERE node IS NOT NULL;

CREATE TABLE {lock} (
    task_id       text PRIMARY KEY,
    node_patterns jsonb NOT NULL,
    reason        text,
    created_at    timestamptz NOT NULL DEFAULT now(),
    created_by    text NOT NULL,
    expires_at    timestamptz
);

CREATE TABLE {rebalance} (
    id             bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    triggered_at   timestamptz NOT NULL DEFAULT now(),
    trigger_reason text NOT NULL,
    leader_node    text NOT NULL,
    nodes_before   integer NOT NULL,
    nodes_after    integer NOT NULL,
    tokens_moved   integer NOT NULL,
    duration_ms    integer NOT NULL
);

CREATE TABLE {claim} (
    node        text NOT NULL,
    task_id     text NOT NULL,
    created_on  timestamptz NOT NULL DEFAULT now(),
    date        date NOT NULL,
    token       integer NOT NULL,
    incarnation text NOT NULL,
    PRIMARY KEY (task_id, date)
);
CREATE INDEX ON {claim} (node, incarnation);

CREATE TABLE {audit} (
    created_on timestamptz NOT NULL DEFAULT now(),
    node       text NOT NULL,
    task_id    text NOT NULL,
    date       date NOT NULL,
    token      integer NOT NULL,
    PRIMARY KEY (date, task_id)
);
CREATE INDEX ON {audit} (date, token);

CREATE TABLE {execution} (
    key           text PRIMARY KEY,
    state         text NOT NULL CHECK (state IN ('running', 'done', 'failed')),
    node          text NOT NULL,
    incarnation   text NOT NULL,
    host          text NOT NULL,
    boot_id       text NOT NULL,
    pid_namespace text NOT NULL,
    pid           integer NOT NULL,
    started       text NOT NULL,
    fence         bigint  NOT NULL,
    attempts      integer NOT NULL,
    started_at    timestamptz NOT NULL,
    finished_at   timestamptz,
    result        jsonb,
    error         text,
    expires_at    timestamptz
);
CREATE INDEX ON {execution} (expires_at) WHERE expires_at IS NOT NULL;
CREATE INDEX ON {execution} (node, incarnation) WHERE state = 'running';

CREATE TABLE {queue} (
    name       text PRIMARY KEY,
    node       text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now()
);

INSERT INTO {cluster} (schema_version) VALUES ({schema_version});
