"""One suite for every framework and broker: real worker processes, real servers, real faults, and
the history checked afterwards.
"""
