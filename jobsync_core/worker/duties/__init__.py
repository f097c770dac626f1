"""What a node does beside its messages: one duty a file, and one runner for all of them."""
