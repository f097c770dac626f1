"""Placeholder until the inspect command is written."""
