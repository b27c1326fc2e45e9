"""One message in this process' hands: what can be done with it while its session lives."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Coroutine
from enum import Enum
from typing import Any

import structlog
from aio_pika import Message
from aio_pika.abc import AbstractIncomingMessage

from shared.adapters.queue_outcomes import Ending, Finish, GiveUp, OnGivenUp, PutBack, Retry, remember_failure
from shared.adapters.queue_rabbitmq.connection import BROKER_ERRORS, Backoff, Session
from shared.adapters.queue_rabbitmq.messages import to_dead_letter, to_message
from shared.adapters.queue_rabbitmq.publisher import Publisher
from shared.adapters.queue_rabbitmq.topology import Topology
from shared.domain.errors import JobQueueUnavailable
from shared.domain.jobs import FetchJob

log = structlog.get_logger()


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

    async def acknowledge(self) -> None:
        """The broker may forget the message. Best effort: an answer that gets lost means another delivery."""
        await self._answer(self.message.ack())

    async def put_back(self) -> None:
        """The broker may deliver the message anew, to anybody, at once."""
        await self._answer(self.message.nack(requeue=True))

    async def _answer(self, answer: Coroutine[Any, Any, None]) -> None:
        try:
            await answer
        except BROKER_ERRORS as error:
            self._session.lose(f"answer not sent: {error!r}")
            log.warning("delivery_lost", message_id=self.key, error=repr(error))


class Stage(Enum):
    """How far a message in custody is. In the last stage its answer is on the way: a new delivery is another's."""

    WAITING = "waiting"
    HANDLING = "handling"
    SETTLING = "settling"
    OVER = "over"


class Custody:
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

    async def acknowledge(self) -> None:
        await self._end(self.delivery.acknowledge)

    async def put_back(self) -> None:
        await self._end(self.delivery.put_back)

    async def _end(self, answer: Callable[[], Awaitable[None]]) -> None:
        self.stage = Stage.OVER
        if self.is_live:
            await answer()
        else:
            log.warning("delivery_lost", message_id=self.delivery.key)


class Settlement:
    """Does what a job's ending means, in the order that loses nothing: publish, confirmed, before the ack.

    While the broker takes no messages the job keeps its slot and its message: putting it back instead would have it
    delivered again at once, in circles. It ends early when the delivery is lost or the consumer stops.
    """

    def __init__(self, publisher: Publisher, topology: Topology, on_given_up: OnGivenUp) -> None:
        self._publisher = publisher
        self._topology = topology
        self._on_given_up = on_given_up
        self.stopping = asyncio.Event()

    async def settle(self, custody: Custody, job: FetchJob, ending: Ending) -> None:
        """A job whose delivery is lost comes again: then its ending is left to that run."""
        custody.stage = Stage.SETTLING
        match ending if custody.is_live else PutBack():
            case Finish():
                await custody.acknowledge()
            case PutBack():
                await custody.put_back()
            case Retry(again, delay):
                await self._replace(custody, self._topology.delay(delay), to_message(again))
            case GiveUp(reason):
                await remember_failure(self._on_given_up, job, reason)
                await self.bury(custody, reason)

    async def bury(self, custody: Custody, reason: str) -> None:
        """Dead-letter the message as it came."""
        custody.stage = Stage.SETTLING
        log.warning("job_given_up", message_id=custody.delivery.key, reason=reason)
        await self._replace(custody, self._topology.dead, to_dead_letter(custody.delivery.message, reason))

    async def _replace(self, custody: Custody, queue: str, message: Message) -> None:
        backoff = Backoff(first=0.5, cap=5.0)
        while custody.is_live:
            try:
                await self._publisher.publish(queue, message)
            except JobQueueUnavailable as error:
                log.warning("job_cannot_be_passed_on", queue=queue, error=str(error))
                if self.stopping.is_set():
                    break
                await self._pause(backoff)
            else:
                await custody.acknowledge()
                return
        await custody.put_back()

    async def _pause(self, backoff: Backoff) -> None:
        try:
            async with asyncio.timeout(backoff.next_delay()):
                await self.stopping.wait()
        except TimeoutError:
            return
