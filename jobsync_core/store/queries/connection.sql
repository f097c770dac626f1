-- What a connection asks when it is opened.

-- piece: history
-- The database's system identifier and timeline. pg_control_checkpoint() still shows the old
-- timeline for a while after a promotion; the name of the present WAL file does not. Neither changes
-- when the server restarts, nor when it recovers from a crash.
(
    (SELECT h.system_identifier::text FROM pg_control_system() AS h) || ' ' ||
    CASE WHEN pg_is_in_recovery() THEN 'standby'
        ELSE left(pg_walfile_name(pg_current_wal_lsn()), 8) END)

-- name: history
-- The database's history.
SELECT {history}

-- name: address
-- The server's address, where the role may not ask for the history: behind a pooler it tells nothing.
SELECT coalesce(host(inet_server_addr()), 'local') || ' ' ||
    coalesce(inet_server_port(), 0)::text
