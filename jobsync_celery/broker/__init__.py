"""The broker, as workers, producers and `celery beat` need it; what is of Redis alone is in
`jobsync_celery/redis`.
"""
