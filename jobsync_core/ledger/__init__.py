"""Executions: each key completes once."""
