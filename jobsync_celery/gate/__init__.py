"""The gate between a worker's consumer and its pool."""
