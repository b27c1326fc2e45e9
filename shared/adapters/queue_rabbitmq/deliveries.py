"""One message in this process' hands: what can be done with it while its session lives."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from enum import Enum
from functools import partial

import structlog
from aio_pika import Message
from aio_pika.abc import AbstractIncomingMessage

from shared.adapters.queue_outcomes import (
    Ending,
    Finish,
    GiveUp,
    OnDeadLetter,
    PutBack,
    Retry,
    remember_failure,
)
from shared.adapters.queue_rabbitmq.connection import BROKER_ERRORS, Backoff, Session
from shared.adapters.queue_rabbitmq.messages import to_dead_letter, to_message
from shared.adapters.queue_rabbitmq.publisher import Publisher
from shared.adapters.queue_rabbitmq.topology import Topology
from shared.domain.errors import JobQueueUnavailable
from shared.domain.jobs import FetchJob
from shared.observability.metrics import JOB_QUEUE_ERRORS

logger = structlog.get_logger()


class Delivery:
    """A message as one session delivered it. Once the session is lost the broker delivers it anew, to whomever."""

    def __init__(self, message: AbstractIncomingMessage, session: Session) -> None:
        self.message = message
        self._session = session

    @property
    def key(self) -> str:
        """The same for every delivery of one message."""
        return self.message.message_id or hashlib.sha256(self.message.body).hexdigest()

    @property
    def is_live(self) -> bool:
        """True while it can be acknowledged."""
        return not self._session.lost.is_set()

    async def acknowledge(self) -> bool:
        """The broker may forget the message. False: that did not reach it."""
        return await self._respond(self.message.ack)

    async def requeue(self) -> bool:
        """The broker may deliver the message anew, to anybody, at once."""
        return await self._respond(partial(self.message.nack, requeue=True))

    async def _respond(self, answer: Callable[[], Awaitable[None]]) -> bool:
        if self.is_live:
            try:
                await answer()
                return True
            except BROKER_ERRORS as error:
                self._session.mark_lost(f"answer not sent: {error!r}")
        JOB_QUEUE_ERRORS.labels(operation="ack").inc()
        logger.warning("delivery_lost", message_id=self.key)
        return False


class Stage(Enum):
    """How far a message in flight is. In the last stage its answer is on the way: a new delivery is another's."""

    WAITING = "waiting"
    HANDLING = "handling"
    SETTLING = "settling"
    DONE = "over"


class InFlight:
    """A message from its first delivery to its answer.

    `delivery` is replaced when the broker delivers it again while the job still runs (after a consumer timeout or a
    lost connection): the job runs once, the last delivery is answered.
    """

    def __init__(self, delivery: Delivery) -> None:
        self.delivery = delivery
        self.stage = Stage.WAITING

    @property
    def is_live(self) -> bool:
        """True while an answer would reach the broker."""
        return self.delivery.is_live

    async def acknowledge(self) -> bool:
        self.stage = Stage.DONE
        return await self.delivery.acknowledge()

    async def requeue(self) -> None:
        self.stage = Stage.DONE
        await self.delivery.requeue()


class Settler:
    """Does what a job's ending means, in the order that loses nothing: publish, confirmed, before the ack.

    While the broker takes no messages the job keeps its slot and its message: putting it back instead would have it
    delivered again at once, in circles. It ends early when the delivery is lost or the consumer stops.
    """

    def __init__(self, publisher: Publisher, topology: Topology, on_dead_letter: OnDeadLetter) -> None:
        self._publisher = publisher
        self._topology = topology
        self._on_dead_letter = on_dead_letter
        self.stopping = asyncio.Event()

    async def settle(self, in_flight: InFlight, job: FetchJob, ending: Ending) -> Ending | None:
        """Returns what is still owed if the delivery got lost on the way: to be settled with the next one."""
        in_flight.stage = Stage.SETTLING
        match ending:
            case Finish():
                return None if await in_flight.acknowledge() else ending
            case PutBack():
                await in_flight.requeue()
                return None
            case Retry(again, delay):
                return await self._replace(in_flight, self._topology.delay(delay), to_message(again), ending)
            case GiveUp(reason):
                if in_flight.is_live:
                    await remember_failure(self._on_dead_letter, job, reason)
                return await self.dead_letter(in_flight, reason)

    async def dead_letter(self, in_flight: InFlight, reason: str) -> Ending | None:
        """Dead-letter the message as it came."""
        in_flight.stage = Stage.SETTLING
        logger.warning("job_dead_lettered", message_id=in_flight.delivery.key, reason=reason)
        letter = to_dead_letter(in_flight.delivery.message, reason)
        return await self._replace(in_flight, self._topology.dead, letter, GiveUp(reason))

    async def _replace(
        self, in_flight: InFlight, queue: str, message: Message, ending: Ending
    ) -> Ending | None:
        backoff = Backoff(first=0.5, cap=5.0)
        while in_flight.is_live:
            try:
                await self._publisher.publish(queue, message)
            except JobQueueUnavailable as error:
                JOB_QUEUE_ERRORS.labels(operation="republish").inc()
                logger.warning("republish_failed", queue=queue, error=str(error))
                if self.stopping.is_set():
                    await in_flight.requeue()
                    return None
                await self._pause(backoff)
            else:
                return None if await in_flight.acknowledge() else Finish()
        in_flight.stage = Stage.DONE
        return ending

    async def _pause(self, backoff: Backoff) -> None:
        try:
            async with asyncio.timeout(backoff.next_delay()):
                await self.stopping.wait()
        except TimeoutError:
            return
