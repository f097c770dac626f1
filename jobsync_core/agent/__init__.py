"""The thread that drives the protocol, and what runs beside it."""
