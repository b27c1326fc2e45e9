"""The JobQueue port on RabbitMQ: publisher, consumer and queue lengths together."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

from aio_pika.exceptions import ChannelNotFoundEntity

from distributor_node.shared.adapters.queue_rabbitmq.connection import (
    BROKER_ERRORS,
    CONNECT_SECONDS,
    Publisher,
    Session,
    Topology,
    open_session,
    to_message,
)
from distributor_node.shared.adapters.queue_rabbitmq.consumer import Consumer, Settler
from distributor_node.shared.domain.errors import JobQueueUnavailable
from distributor_node.shared.domain.jobs import FetchJob, RetryPlan
from distributor_node.shared.ports.job_queue import JobHandler, OnDeadLetter, QueueDepth


class RabbitJobQueue:
    """A JobQueue on RabbitMQ, with one connection each for publishing, consuming and reading queue lengths.

    After a consumer timeout the broker redelivers the job. A handler that still runs in this process is not started a
    second time.
    """

    def __init__(
        self,
        url: str,
        name_prefix: str,
        retry_plan: RetryPlan,
        publish_timeout: float,
        consumer_timeout_ms: int | None = None,
    ) -> None:
        """Every queue name starts with `name_prefix`. `publish_timeout` is in seconds.

        `consumer_timeout_ms` must be longer than the longest download. Brokers before 3.12 ignore it, see Topology.
        """
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
        """See the port. Raises ConfigurationError if a queue exists on the broker with other arguments."""
        settler = Settler(self._publisher, self._topology, on_dead_letter)
        await Consumer(self._url, self._topology, settler, handler, concurrency).run()

    async def depth(self) -> QueueDepth:
        topology = self._topology
        ready, dead, *delayed = await self._stats.count((topology.work, topology.dead, *topology.delays))
        return QueueDepth(ready=ready, delayed=sum(delayed), dead=dead)


class QueueStats:
    """Reads queue lengths, on a connection that never publishes and so is never blocked by the broker.

    Connects on the first call and stays connected. Every call ends within `timeout` seconds.
    """

    def __init__(self, url: str, timeout: float) -> None:
        self._url = url
        self._timeout = timeout
        self._lock = asyncio.Lock()
        self._session: Session | None = None
        self._resources = AsyncExitStack()

    async def count(self, queues: tuple[str, ...]) -> list[int]:
        """Return the number of ready messages of each queue, 0 for a missing queue.

        Without queues the broker is only probed. Raises JobQueueUnavailable.
        """
        try:
            async with asyncio.timeout(self._timeout), self._lock:
                try:
                    session = await self._connected()
                    return [await _count(session, queue) for queue in queues] or [await _probe(session)]
                except BaseException:
                    self._drop("a request failed")
                    raise
        except BROKER_ERRORS as error:
            raise JobQueueUnavailable(f"broker does not respond: {error!r}") from error

    async def close(self) -> None:
        async with self._lock:
            self._drop("closed")
            await self._resources.aclose()

    async def _connected(self) -> Session:
        if self._session is None or self._session.lost.is_set():
            await self._resources.aclose()
            self._session = await self._resources.enter_async_context(
                open_session(self._url, "distributor inspector", confirms=False)
            )
        return self._session

    def _drop(self, reason: str) -> None:
        if self._session is not None:
            self._session.mark_lost(reason)


async def _count(session: Session, queue: str) -> int:
    """Use a separate channel, because the broker closes the channel if the queue does not exist."""
    try:
        async with session.connection.channel(publisher_confirms=False) as channel:
            declared = await channel.declare_queue(queue, passive=True)
            return declared.declaration_result.message_count or 0
    except ChannelNotFoundEntity:
        return 0


async def _probe(session: Session) -> int:
    """Open and close a channel."""
    async with session.connection.channel(publisher_confirms=False):
        return 0
