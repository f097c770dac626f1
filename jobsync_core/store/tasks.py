"""Rows of the claim and audit tables: which tasks nodes have begun, and which they have
finished.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Sequence
from typing import cast

from psycopg2.extensions import TRANSACTION_STATUS_IDLE

from ..results import AuditedTask, TaskAudit, TaskClaim
from .base import Store

__all__ = ['BATCH', 'TaskStore']

#: Rows that one statement writes or deletes.
BATCH = 10_000


class TaskStore(Store):
    """Claims and audits."""

    def claim(
        self,
        node: str,
        incarnation: str,
        date: datetime.date,
        rows: Sequence[tuple[str, int]],
        child: int | None = None,
    ) -> list[str]:
        """Record durably that `node` takes tasks; what is refused belongs to somebody else.

        A task is accepted when the database names this life of the node as owner of the token,
        nobody has audited the task for the date, and no other live node has claimed it; or when
        this life of the node has a claim already. The assignment rows are share-locked meanwhile: a
        hand-over of the token comes wholly before (then the claim is refused) or wholly after (then
        the new owner sees the claim).

        If no transaction is open on the connection, the claims are committed when this returns.

        Args:
            node: The node's name.
            incarnation: Its present life.
            date: The date of the audit.
            rows: Task id as text, and its token.
            child: The process, where a forked child takes the tasks for the audit: then the node's
                exit audits them.

        Returns:
            The texts that were accepted.
        """
        if not rows:
            return []
        connection = self.connection
        # Alone it is one round trip and one implicit transaction; there is no moment at which a
        # stopped process would hold the locks.
        own = (
            connection.info.transaction_status == TRANSACTION_STATUS_IDLE
            and not connection.autocommit
        )
        if own:
            connection.autocommit = True
        try:
            accepted = self._rows(
                'task.claim',
                {
                    'node': node,
                    'incarnation': incarnation,
                    'date': date,
                    'texts': sorted({text for text, _ in rows}),
                    'child': child,
                    'task_ids': [text for text, _ in rows],
                    'tokens': [token for _, token in rows],
                },
            )
            return [text for (text,) in accepted]
        finally:
            if own and not connection.closed:
                connection.autocommit = False

    def read_epoch(self) -> int:
        """The cluster's epoch."""
        row = self._row('task.epoch')
        return int(row[0]) if row else 0

    def count_audits(self, date: datetime.date, most: int) -> int:
        """How many tasks are audited for the date by clusters that have ended; `most` where there
        are more.
        """
        ((number,),) = self._rows('task.count_ended', {'date': date, 'most': most})
        return int(number)

    def audit(
        self,
        node: str,
        date: datetime.date,
        rows: Iterable[tuple[str, int]],
        epoch: int | None = None,
    ) -> None:
        """Record tasks, given as text and token, as finished by `node` for the date, and drop its
        claims on them.

        Args:
            node: The node's name.
            date: The date of the audit.
            rows: Task id as text, and its token.
            epoch: The cluster's epoch in which the tasks were taken; None: the present one.
        """
        tokens = dict(rows)
        if tokens:
            self._run(
                'task.audit',
                {
                    'node': node,
                    'date': date,
                    'texts': list(tokens),
                    'tokens': list(tokens.values()),
                    'epoch': epoch,
                },
            )

    def audit_children(
        self, node: str, incarnation: str, date: datetime.date, child: int | None = None
    ) -> int:
        """Audit what forked children of this life of the node have taken for the audit; one batch.

        Args:
            node: The node's name.
            incarnation: Its present life.
            date: The date of the audit.
            child: Only what this process took; None: all of them.

        Returns:
            How many rows; there may be more where it is BATCH.
        """
        ((number,),) = self._rows(
            'task.audit_children',
            {
                'node': node,
                'incarnation': incarnation,
                'date': date,
                'child': child,
                'batch': BATCH,
            },
        )
        return int(number)

    def get_audit(self, date: datetime.date) -> list[AuditedTask]:
        """Who finished what for the date, in the order of recording."""
        return cast(list[AuditedTask], self._dicts('task.audits', {'date': date}))

    def history(self, text: str) -> tuple[TaskAudit | None, TaskClaim | None]:
        """What is known of a task on its latest date. An audit counts while the cluster lives in
        which it was written; a claim is a live node's.
        """
        audit: TaskAudit | None = None
        claim: TaskClaim | None = None
        if row := self._row('task.latest_audit', {'task': text}):
            audit = {
                'node': row[0],
                'date': row[1],
                'created_on': row[2],
                'counts': row[3],
                'lives': row[4],
            }
        if row := self._row('task.latest_claim', {'task': text}):
            claim = {'node': row[0], 'date': row[1], 'created_on': row[2], 'promised': row[3]}
        return audit, claim

    def is_taken(self, node: str, date: datetime.date, text: str) -> bool:
        """Whether the task is audited for the date by anybody, or claimed for it by a live node
        other than `node`.
        """
        ((taken,),) = self._rows('task.is_taken', {'node': node, 'date': date, 'text': text})
        return bool(taken)

    def release_promise(self, node: str, incarnation: str, date: datetime.date, text: str) -> bool:
        """Take back what a hand-over recorded as promised to this life of the node; whether it was
        there, and not yet a claim.
        """
        deleted = self._run(
            'task.release_promise',
            {'text': text, 'date': date, 'node': node, 'incarnation': incarnation},
        )
        return deleted == 1

    def release_claims(
        self, node: str, incarnation: str, texts: Sequence[str] | None = None
    ) -> int:
        """Delete claims of this life of the node, but those that its children took for the audit;
        one batch.

        Args:
            node: The node's name.
            incarnation: Its present life.
            texts: Only claims on these tasks, whoever took them; None: all.

        Returns:
            How many rows; there may be more where it is BATCH.
        """
        return self._run(
            'task.release_claims',
            {
                'node': node,
                'incarnation': incarnation,
                'texts': list(texts) if texts is not None else None,
                'batch': BATCH,
            },
        )
