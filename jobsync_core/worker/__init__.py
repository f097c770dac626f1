"""What the workers of both queue frameworks share."""
