"""The tables of payments."""

# mypy: allow-subclassing-any
from __future__ import annotations

from typing import Any, ClassVar

from django.db import migrations, models


class Migration(migrations.Migration):
    """Makes both tables."""

    initial = True
    dependencies: ClassVar[list[Any]] = []
    operations: ClassVar[list[Any]] = [
        migrations.CreateModel(
            'Account',
            [
                (
                    'id',
                    models.BigAutoField(
                        auto_created=True, primary_key=True, serialize=False, verbose_name='ID'
                    ),
                ),
                ('cents', models.IntegerField(default=0)),
            ],
        ),
        migrations.CreateModel(
            'Booking',
            [
                (
                    'id',
                    models.BigAutoField(
                        auto_created=True, primary_key=True, serialize=False, verbose_name='ID'
                    ),
                ),
                ('payment_id', models.IntegerField()),
                ('cents', models.IntegerField()),
                ('account', models.ForeignKey('payments.Account', on_delete=models.CASCADE)),
            ],
        ),
    ]
