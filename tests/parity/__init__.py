"""The same configuration and the same messages, with the plain framework and with JobSync: the same
end state.
"""
