"""A node's life, without I/O and without a clock.

Why at most one node claims a token at any instant:
1. Only the owner named in the database has a token in its set, and the database names one.
2. A live owner loses a token in one way: it takes it out of its set first and gives the row away
   afterwards (`Give`).
3. A dead owner loses all in one way: its row is deleted by somebody who has seen no heartbeat for a
   whole timeout, while its lease, counted from the sending of its last answered heartbeat, lasts
   less than that.
4. Statements that arrive late carry an incarnation and a version, and find nothing to change.
5. All this holds within one history of the database. A promoted standby, which may lack the last
   writes, begins another one. Each heartbeat asks whether the database still holds the last one
   that was answered, and by which name its history goes. A node whose last heartbeat is missing, or
   that hears another name, claims nothing for a timeout, by when all leases of the history before
   are over. A node that knows nothing of the one before waits as well, unless the cluster's row has
   the present name: it is written by a node that has waited, and only where that node's last
   heartbeat is; or by the first node of all, and only where the server was never promoted. A
   standby has in its rows no name of a timeline that it did not follow, so that a name which two
   promotions share misleads nobody.
"""

__all__: list[str] = []
