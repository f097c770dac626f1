"""The brokers as the plugin uses them: one interface, and one folder's worth of code for each of
Redis and RabbitMQ.
"""
