"""The protocol under virtual time: a seeded scheduler, a simulated store, and the invariants
checked after every step.
"""
