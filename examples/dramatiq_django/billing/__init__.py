"""A project that books payments once each."""
