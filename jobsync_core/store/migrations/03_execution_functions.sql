-- Version 3: beginning and finishing an execution are functions, whose plans each connection of the server keeps: planning
-- took most of the time of these two statements, and a statement that is prepared in a session is lost behind a pooler.

{begin_execution_v1}

{finish_execution_v1}

UPDATE {cluster} SET schema_version = 3 WHERE schema_version < 3;
