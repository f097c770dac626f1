"""An app's coordinated tasks, and what happens where one of them runs."""
