"""A shop whose orders are charged once each."""
