"""Tables of payments."""

# mypy: allow-subclassing-any
from __future__ import annotations

from django.db import models


class Account(models.Model):
    """An account with its balance."""

    cents = models.IntegerField(default=0)


class Booking(models.Model):
    """One movement; nothing in the table itself prevents a second one for the same payment."""

    payment_id = models.IntegerField()
    account = models.ForeignKey(Account, on_delete=models.CASCADE)
    cents = models.IntegerField()
