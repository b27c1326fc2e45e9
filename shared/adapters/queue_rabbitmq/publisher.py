"""Publishes messages and waits for confirms.

It has a connection of its own, because a broker that blocks publishing blocks the whole connection, acks included.
"""

from __future__ import annotations

import asyncio

import structlog
from aio_pika import Message
from aio_pika.exceptions import PublishError

from distributor_node.shared.adapters.queue_rabbitmq.connection import (
    BROKER_ERRORS,
    Session,
    Topology,
    open_session,
)
from distributor_node.shared.domain.errors import ConfigurationError, JobQueueUnavailable
from distributor_node.shared.observability.metrics import JOB_QUEUE_ERRORS
from distributor_node.shared.waiting import Backoff, cancel_and_wait

logger = structlog.get_logger()


class Publisher:
    """Keeps one session open in the background, from `open` to `close`.

    While the broker is known to be down or to refuse messages, `publish` fails at once, because a client waits for
    most jobs. Otherwise every call ends within `timeout` seconds.
    """

    def __init__(self, url: str, topology: Topology, timeout: float) -> None:
        self._url = url
        self._topology = topology
        self._timeout = timeout
        self._session: Session | None = None
        self._failure: str | None = None
        self._state_known = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def open(self) -> None:
        if self._task is None:
            self._task = asyncio.create_task(self._stay_connected(), name="job-publisher")

    async def close(self) -> None:
        if self._task is not None:
            await cancel_and_wait(self._task)
            self._task = None
        self._set_state(None, "job queue is closed")

    async def publish(self, queue: str, message: Message) -> None:
        """Publish and wait for the confirm. Raises JobQueueUnavailable."""
        try:
            await self._publish_within_timeout(queue, message)
        except JobQueueUnavailable:
            JOB_QUEUE_ERRORS.labels(operation="publish").inc()
            raise

    async def _publish_within_timeout(self, queue: str, message: Message) -> None:
        session: Session | None = None
        try:
            async with asyncio.timeout(self._timeout):
                session = await self._connected()
                await self._publish(session, queue, message)
        except TimeoutError as error:
            if session is not None and not await session.is_blocked():
                session.mark_lost(f"no confirm within {self._timeout} s")
            raise JobQueueUnavailable(f"no confirm from the broker within {self._timeout} s") from error
        except BROKER_ERRORS as error:
            raise JobQueueUnavailable(f"publishing failed: {error!r}") from error
        except ConfigurationError as error:
            raise JobQueueUnavailable(str(error)) from error

    async def _connected(self) -> Session:
        await self._state_known.wait()
        if self._session is None:
            raise JobQueueUnavailable(self._failure or "not connected to the broker")
        if await self._session.is_blocked():
            raise JobQueueUnavailable("broker has blocked publishing (memory or disk alarm)")
        return self._session

    async def _publish(self, session: Session, queue: str, message: Message) -> None:
        exchange = session.channel.default_exchange
        try:
            await exchange.publish(message, routing_key=queue, mandatory=True)
        except PublishError:
            logger.warning("queue_redeclared", queue=queue)
            await self._topology.declare(session.channel)
            await exchange.publish(message, routing_key=queue, mandatory=True)

    async def _stay_connected(self) -> None:
        backoff = Backoff()
        while True:
            try:
                async with open_session(self._url, "distributor publisher", confirms=True) as session:
                    await self._topology.declare(session.channel)
                    self._set_state(session, None)
                    backoff.reset()
                    await session.lost.wait()
                    self._clear_state()
                    logger.warning("publisher_connection_lost", why=session.reason)
            except Exception as error:  # noqa: BLE001  publishers report any error, and the loop goes on
                reason = (
                    str(error)
                    if isinstance(error, ConfigurationError)
                    else f"cannot connect to the broker: {error!r}"
                )
                if reason != self._failure:
                    logger.error("publisher_connect_failed", reason=reason)
                self._set_state(None, reason)
            await backoff.wait()

    def _set_state(self, session: Session | None, failure: str | None) -> None:
        self._session, self._failure = session, failure
        self._state_known.set()

    def _clear_state(self) -> None:
        self._session = None
        self._state_known.clear()
