"""The job queue on RabbitMQ, 3.10 to 4.x."""

from distributor_node.shared.adapters.queue_rabbitmq.queue import RabbitJobQueue

__all__ = ["RabbitJobQueue"]
