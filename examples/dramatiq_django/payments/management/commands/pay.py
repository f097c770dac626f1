"""Sends payments, each of them twice: `python manage.py pay 20`."""

# mypy: allow-subclassing-any
from __future__ import annotations

from typing import Any

from django.core.management.base import BaseCommand

from ...models import Account, Booking
from ...tasks import book

_WAIT_MS = 60_000


class Command(BaseCommand):
    """Sends payments of one cent to an account, waits, and shows what was booked."""

    help = __doc__

    def add_arguments(self, parser: Any) -> None:
        """Take the number of payments."""
        parser.add_argument('count', type=int)

    def handle(self, *args: Any, count: int, **options: Any) -> None:
        """Send, wait, show."""
        account = Account.objects.create()
        for message in [
            book.send(payment_id, account.id, 1) for payment_id in range(count) for _ in range(2)
        ]:
            message.get_result(block=True, timeout=_WAIT_MS)
        account.refresh_from_db()
        self.stdout.write(f'{Booking.objects.count()} bookings, balance {account.cents}')
