-- Version 5: what housekeeping looks for is found by an index, and vacuum keeps up with what it deletes.

-- Claims by the life of the node that made them, so that those of nodes that are gone are found without looking at all others;
-- and the few that are only promised. Making the first takes about a second for each million claims that there are.
CREATE INDEX IF NOT EXISTS {claim_life} ON {claim} (node, incarnation);
CREATE INDEX IF NOT EXISTS {claim_promised} ON {claim} (created_on) WHERE promised;

-- By default vacuum waits until a fifth of a table is dead, and then goes slowly: the ledger of a busy cluster would be a fifth
-- larger than it need be, and each look into its indexes would meet dead entries. These tables are vacuumed after a hundredth, and
-- at ten times the speed, since each of their rows is inserted, updated once and deleted within its retention.
ALTER TABLE {execution} SET (
    autovacuum_vacuum_scale_factor = 0.01, autovacuum_vacuum_threshold = 10000, autovacuum_vacuum_cost_limit = 2000,
    autovacuum_analyze_scale_factor = 0.05, toast.autovacuum_vacuum_scale_factor = 0.01, toast.autovacuum_vacuum_cost_limit = 2000);
ALTER TABLE {claim} SET (
    autovacuum_vacuum_scale_factor = 0.01, autovacuum_vacuum_threshold = 10000, autovacuum_vacuum_cost_limit = 2000,
    autovacuum_analyze_scale_factor = 0.05);
-- Small tables that change all the time: a page that heartbeats or plans fill with dead rows is read by everybody. The number of
-- changes counts here, not the part of the table.
ALTER TABLE {node} SET (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000, autovacuum_vacuum_cost_delay = 0);
ALTER TABLE {assignment} SET (autovacuum_vacuum_scale_factor = 0.05, autovacuum_vacuum_threshold = 1000, autovacuum_vacuum_cost_delay = 0);

UPDATE {cluster} SET schema_version = 5 WHERE schema_version < 5;
