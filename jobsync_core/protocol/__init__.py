"""A node's life, without I/O."""
