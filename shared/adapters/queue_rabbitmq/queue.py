"""The port's verbs, put together."""

from __future__ import annotations

from shared.adapters.queue_outcomes import OnDeadLetter
from shared.adapters.queue_rabbitmq.connection import CONNECT_SECONDS
from shared.adapters.queue_rabbitmq.consumer import Consumer
from shared.adapters.queue_rabbitmq.deliveries import Settler
from shared.adapters.queue_rabbitmq.inspector import QueueStats
from shared.adapters.queue_rabbitmq.messages import to_message
from shared.adapters.queue_rabbitmq.publisher import Publisher
from shared.adapters.queue_rabbitmq.topology import Topology
from shared.domain.jobs import FetchJob, RetryPlan
from shared.ports.job_queue import JobHandler, QueueDepth


class RabbitJobQueue:
    """A JobQueue on RabbitMQ, with one connection each for publishing, consuming and looking.

    `name_prefix` begins every queue's name. `publish_timeout` in seconds. `consumer_timeout_ms`: longer than the
    longest download; obeyed by brokers from 3.12 on, see Topology. After a consumer timeout the broker delivers the
    job again; a handler that still runs in this process is not started a second time.
    """

    def __init__(
        self,
        url: str,
        name_prefix: str,
        retry_plan: RetryPlan,
        publish_timeout: float,
        consumer_timeout_ms: int | None = None,
    ) -> None:
        self._url = url
        self._topology = Topology(name_prefix, retry_plan, consumer_timeout_ms)
        self._publisher = Publisher(url, self._topology, publish_timeout)
        self._stats = QueueStats(url, CONNECT_SECONDS)

    async def open(self) -> None:
        self._publisher.open()

    async def close(self) -> None:
        await self._publisher.close()
        await self._stats.close()

    async def ping(self) -> None:
        await self._stats.count(())

    async def publish(self, job: FetchJob) -> None:
        await self._publisher.publish(self._topology.work, to_message(job))

    async def consume(self, handler: JobHandler, concurrency: int, on_dead_letter: OnDeadLetter) -> None:
        """ConfigurationError if a queue exists on the broker with other arguments."""
        settler = Settler(self._publisher, self._topology, on_dead_letter)
        await Consumer(self._url, self._topology, settler, handler, concurrency).run()

    async def depth(self) -> QueueDepth:
        topology = self._topology
        ready, dead, *delayed = await self._stats.count((topology.work, topology.dead, *topology.delays))
        return QueueDepth(ready=ready, delayed=sum(delayed), dead=dead)
