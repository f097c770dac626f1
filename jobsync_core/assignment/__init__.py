"""Who owns which token: pure functions over values."""
