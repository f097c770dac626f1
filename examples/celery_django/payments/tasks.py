"""Tasks of payments."""

# mypy: allow-untyped-decorators
from __future__ import annotations

from celery import shared_task
from django.db import connection, transaction
from django.db.models import F

from jobsync_celery import current_execution, exactly_once

from .models import Account, Booking


@shared_task
@exactly_once(key='payment:{payment_id}')
def book(payment_id: int, account_id: int, cents: int) -> int:
    """Book a payment: its row, the balance and the key's completion are one transaction."""
    with transaction.atomic():
        Booking.objects.create(payment_id=payment_id, account_id=account_id, cents=cents)
        Account.objects.filter(id=account_id).update(cents=F('cents') + cents)
        with connection.cursor() as cursor:
            current_execution().complete(cursor, result=cents)
    return cents
