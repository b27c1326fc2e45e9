"""The whole node in one process, without Redis and RabbitMQ."""
