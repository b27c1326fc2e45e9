"""Taking jobs: one session after another, and handlers that outlive a lost session."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from enum import Enum
from functools import partial
from typing import Any

import structlog
from aio_pika import Message
from aio_pika.abc import AbstractIncomingMessage

from distributor_node.shared.adapters.queue_outcomes import (
    Ending,
    Finish,
    GiveUp,
    OnDeadLetter,
    PutBack,
    Retry,
    decide_ending,
    handle,
    remember_failure,
)
from distributor_node.shared.adapters.queue_rabbitmq.connection import (
    BROKER_ERRORS,
    CLOSE_SECONDS,
    Backoff,
    Session,
    open_session,
)
from distributor_node.shared.adapters.queue_rabbitmq.publisher import Publisher
from distributor_node.shared.adapters.queue_rabbitmq.topology import (
    Topology,
    to_dead_letter,
    to_job,
    to_message,
)
from distributor_node.shared.domain.errors import InvalidJob, JobQueueUnavailable
from distributor_node.shared.domain.jobs import FetchJob
from distributor_node.shared.observability.metrics import JOB_QUEUE_ERRORS
from distributor_node.shared.ports.job_queue import JobHandler

logger = structlog.get_logger()

_DECLARE_SECONDS = 10.0

# Endings of jobs whose delivery was lost, kept until the broker delivers them again (to this process or another).
_MAX_UNSETTLED = 1000


class Consumer:
    """Runs handlers for the work queue, until cancelled. What is no broker trouble ends `run` with its exception."""

    def __init__(
        self, url: str, topology: Topology, settler: Settler, handler: JobHandler, concurrency: int
    ) -> None:
        self._url = url
        self._topology = topology
        self._settler = settler
        self._handler = handler
        self._concurrency = concurrency
        self._slots = asyncio.Semaphore(concurrency)
        self._in_flight: dict[str, InFlight] = {}
        self._unsettled: dict[str, Ending] = {}
        self._tasks: dict[asyncio.Task[None], InFlight] = {}
        self._broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def run(self) -> None:
        """Raise ConfigurationError if a queue exists with other arguments."""
        backoff = Backoff()
        reported = ""
        try:
            while True:
                try:
                    await self._serve_one_session(backoff)
                    reported = ""
                except BROKER_ERRORS as error:
                    if self._broken.done():
                        raise
                    JOB_QUEUE_ERRORS.labels(operation="consume").inc()
                    if repr(error) != reported:
                        reported = repr(error)
                        logger.error("consumer_connect_failed", reason=reported)
                await backoff.wait()
        finally:
            await self._stop_handlers()

    async def _serve_one_session(self, backoff: Backoff) -> None:
        async with open_session(self._url, "distributor consumer", confirms=False) as session:
            tag = await self._begin(session)
            logger.info("consumer_started", queue=self._topology.work, concurrency=self._concurrency)
            backoff.reset()
            try:
                await self._until_lost(session)
            except asyncio.CancelledError:
                # The channel stays open until the handlers have ended, so that what they finish is acknowledged.
                await self._cancel(session, tag)
                await self._stop_handlers()
                raise
            finally:
                session.mark_lost("closed")
            logger.warning("consumer_session_lost", why=session.reason, still_running=len(self._tasks))

    async def _begin(self, session: Session) -> str:
        async with asyncio.timeout(_DECLARE_SECONDS):
            await session.channel.set_qos(prefetch_count=self._concurrency)
            await self._topology.declare(session.channel)
            queue = await session.channel.get_queue(self._topology.work, ensure=False)

            async def take(message: AbstractIncomingMessage) -> None:
                self._on_delivery(Delivery(message, session))

            return await queue.consume(take)

    async def _until_lost(self, session: Session) -> None:
        """Returns when the session is lost; raises what broke a handler's task, which nothing should."""
        lost = asyncio.create_task(session.lost.wait())
        ends: list[asyncio.Future[Any]] = [lost, self._broken]
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        finally:
            lost.cancel()
        if self._broken.done():
            self._broken.result()

    def _on_delivery(self, delivery: Delivery) -> None:
        known = self._in_flight.get(delivery.key)
        is_known = known is not None and known.stage is not Stage.DONE
        if known is not None and is_known and not known.is_live:
            logger.info("job_redelivered_while_running", message_id=delivery.key)
            known.delivery = delivery
            return
        in_flight = InFlight(delivery)
        task = asyncio.create_task(self._process(in_flight), name=f"job-{delivery.key}")
        self._tasks[task] = in_flight
        if not is_known:
            self._in_flight[delivery.key] = in_flight
        task.add_done_callback(self._on_task_done)

    def _on_task_done(self, task: asyncio.Task[None]) -> None:
        in_flight = self._tasks.pop(task)
        if self._in_flight.get(in_flight.delivery.key) is in_flight:
            del self._in_flight[in_flight.delivery.key]
        error = None if task.cancelled() else task.exception()
        if error is not None and not self._broken.done():
            self._broken.set_exception(error)

    async def _process(self, in_flight: InFlight) -> None:
        """One message, from delivery to answer."""
        try:
            job = to_job(in_flight.delivery.message)
        except InvalidJob as error:
            await self._settler.dead_letter(in_flight, f"no job: {error}")
            return
        unsettled = self._unsettled.pop(in_flight.delivery.key, None)
        if unsettled is not None:
            await self._settle(in_flight, job, unsettled)
            return
        try:
            async with self._slots:
                if in_flight.is_live and not self._settler.stopping.is_set():
                    in_flight.stage = Stage.HANDLING
                    outcome = await handle(self._handler, job, self._settler.stopping.is_set)
                    await self._settle(in_flight, job, decide_ending(job, outcome, self._topology.plan))
        except asyncio.CancelledError:
            logger.debug("job_cancelled_before_start", object_id=job.object_id)
        if in_flight.stage is not Stage.DONE:
            await in_flight.requeue()

    async def _settle(self, in_flight: InFlight, job: FetchJob, ending: Ending) -> None:
        unsettled = await self._settler.settle(in_flight, job, ending)
        if unsettled is not None:
            self._unsettled[in_flight.delivery.key] = unsettled
            while len(self._unsettled) > _MAX_UNSETTLED:
                del self._unsettled[next(iter(self._unsettled))]

    async def _cancel(self, session: Session, tag: str) -> None:
        """Have the broker send no more; what came meanwhile is put back."""
        self._settler.stopping.set()
        if not session.lost.is_set():
            try:
                async with asyncio.timeout(CLOSE_SECONDS):
                    await (await session.channel.get_underlay_channel()).basic_cancel(tag)
            except BROKER_ERRORS as error:
                session.mark_lost(f"cancel failed: {error!r}")

    async def _stop_handlers(self) -> None:
        """Cancel what runs or waits for a slot, let what is being settled settle, wait for all of it."""
        self._settler.stopping.set()
        for task, in_flight in self._tasks.items():
            if in_flight.stage in {Stage.WAITING, Stage.HANDLING}:
                task.cancel()
        if self._tasks:
            await asyncio.wait(list(self._tasks))


# One message in this process' hands: what can be done with it while its session lives.


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
