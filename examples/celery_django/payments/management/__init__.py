"""Of the app `payments`."""
