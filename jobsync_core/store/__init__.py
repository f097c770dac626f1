"""All SQL of JobSync: the schema, the connections, and what each part of the system reads and
writes.
"""
