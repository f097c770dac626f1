"""Redis: receiving, passing on and restoring without a moment in which a message is nowhere."""
