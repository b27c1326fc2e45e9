"""Consumes jobs: opens one session after another, and runs handlers that outlive a lost session."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from enum import Enum

import structlog
from aiormq.abc import DeliveredMessage

from distributor_node.shared.adapters.queue_outcomes import report_dead_letter, run_handler
from distributor_node.shared.adapters.queue_rabbitmq.connection import (
    BROKER_ERRORS,
    CLOSE_SECONDS,
    Message,
    Publisher,
    Session,
    Topology,
    open_session,
    to_dead_letter,
    to_job,
    to_message,
)
from distributor_node.shared.domain.errors import InvalidJob, JobQueueUnavailable
from distributor_node.shared.domain.jobs import Ack, DeadLetter, FetchJob, JobOutcome, Nack, Requeue, Retry
from distributor_node.shared.observability.metrics import JOB_QUEUE_ERRORS
from distributor_node.shared.ports.job_queue import JobHandler, OnDeadLetter
from distributor_node.shared.waiting import Backoff, background, wait_event

logger = structlog.get_logger()

_DECLARE_SECONDS = 10.0

_MAX_UNSETTLED = 1000
"""Outcomes kept for jobs whose delivery was lost. They are applied when the broker redelivers the job."""


class Consumer:
    """Runs handlers for the work queue until cancelled. Errors other than the broker's end `run`."""

    def __init__(
        self, url: str, topology: Topology, settler: Settler, handler: JobHandler, concurrency: int
    ) -> None:
        self._url = url
        self._topology = topology
        self._settler = settler
        self._handler = handler
        self._concurrency = concurrency
        self._slots = asyncio.Semaphore(concurrency)
        self._in_flight: dict[str, InFlight] = {}  # by message key
        self._unsettled: dict[str, JobOutcome] = {}  # by message key, oldest first
        self._tasks: dict[asyncio.Task[None], InFlight] = {}
        self._broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def run(self) -> None:
        """Consume through any number of sessions. Raises ConfigurationError if a queue has other arguments."""
        backoff = Backoff()
        reported = ""
        try:
            while True:
                try:
                    await self._run_session(backoff)
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

    async def _run_session(self, backoff: Backoff) -> None:
        async with open_session(self._url, "distributor consumer", confirms=False) as session:
            tag = await self._start_consuming(session)
            logger.info("consumer_started", queue=self._topology.work, concurrency=self._concurrency)
            backoff.reset()
            try:
                await self._wait_until_lost(session)
            except asyncio.CancelledError:
                # The channel stays open until the handlers have ended, so that their jobs can be acknowledged.
                await self._cancel_consumer(session, tag)
                await self._stop_handlers()
                raise
            finally:
                session.mark_lost("closed")
            logger.warning("consumer_session_lost", why=session.reason, still_running=len(self._tasks))

    async def _start_consuming(self, session: Session) -> str:
        """Declare the queues and consume. Returns the consumer tag."""
        async with asyncio.timeout(_DECLARE_SECONDS):
            await session.channel.set_qos(prefetch_count=self._concurrency)
            await self._topology.declare(session.channel)

            async def on_message(message: DeliveredMessage) -> None:
                self._on_delivery(Delivery(message, session))

            consuming = await session.amqp.basic_consume(self._topology.work, on_message)
            return consuming.consumer_tag or ""

    async def _wait_until_lost(self, session: Session) -> None:
        """Return when the session is lost. Raise the error of a job's task, which is a defect."""
        async with background(session.lost.wait(), "consumer-session-lost") as lost:
            await asyncio.wait([lost, self._broken], return_when=asyncio.FIRST_COMPLETED)
        if self._broken.done():
            self._broken.result()

    def _on_delivery(self, delivery: Delivery) -> None:
        """Start a task for the message, unless its job still runs after an earlier delivery was lost."""
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
        """Process one message: decode, run the handler, carry out the outcome."""
        try:
            job = to_job(in_flight.delivery.message)
        except InvalidJob as error:
            await self._settler.dead_letter(in_flight, f"invalid job: {error}")
            return
        unsettled = self._unsettled.pop(in_flight.delivery.key, None)
        if unsettled is not None:
            await self._settle(in_flight, job, unsettled)
            return
        try:
            async with self._slots:
                if in_flight.is_live and not self._settler.stopping.is_set():
                    in_flight.stage = Stage.HANDLING
                    outcome = await run_handler(self._handler, job, self._settler.stopping.is_set)
                    await self._settle(in_flight, job, outcome)
        except asyncio.CancelledError:
            logger.debug("job_cancelled_before_start", object_id=job.object_id)
        if in_flight.stage is not Stage.DONE:
            await in_flight.nack()

    async def _settle(self, in_flight: InFlight, job: FetchJob, outcome: JobOutcome) -> None:
        unsettled = await self._settler.settle(in_flight, job, outcome)
        if unsettled is not None:
            self._unsettled[in_flight.delivery.key] = unsettled
            while len(self._unsettled) > _MAX_UNSETTLED:
                del self._unsettled[next(iter(self._unsettled))]

    async def _cancel_consumer(self, session: Session, tag: str) -> None:
        """Tell the broker to deliver nothing more. Messages that still arrive are nacked."""
        self._settler.stopping.set()
        if not session.lost.is_set():
            try:
                async with asyncio.timeout(CLOSE_SECONDS):
                    await session.amqp.basic_cancel(tag)
            except BROKER_ERRORS as error:
                session.mark_lost(f"cancel failed: {error!r}")

    async def _stop_handlers(self) -> None:
        """Cancel jobs that run or wait for a slot, let the others settle, and wait for all of them."""
        self._settler.stopping.set()
        for task, in_flight in self._tasks.items():
            if in_flight.stage in {Stage.WAITING, Stage.HANDLING}:
                task.cancel()
        if self._tasks:
            await asyncio.wait(list(self._tasks))


class Settler:
    """Carries out outcomes. A message is acknowledged only after its successor is published and confirmed.

    While the broker accepts no messages, the job keeps its slot and its message: after a nack the broker would
    redeliver it at once, in a loop. The wait ends early when the delivery is lost or the consumer stops.
    """

    def __init__(self, publisher: Publisher, topology: Topology, on_dead_letter: OnDeadLetter) -> None:
        self._publisher = publisher
        self._topology = topology
        self._on_dead_letter = on_dead_letter
        self.stopping = asyncio.Event()

    async def settle(self, in_flight: InFlight, job: FetchJob, outcome: JobOutcome) -> JobOutcome | None:
        """Carry out the outcome. Returns what to do with the next delivery if this one was lost, else None."""
        in_flight.stage = Stage.SETTLING
        plan = self._topology.plan
        match plan.resolve(outcome, job.attempt):
            case Ack() as ack:
                return None if await in_flight.acknowledge() else ack
            case Retry() as retry:
                return await self._delay(in_flight, job.next_attempt(), plan.delays[job.attempt - 1], retry)
            case Requeue() as requeue:
                return await self._delay(in_flight, job, plan.delays[0], requeue)
            case DeadLetter(reason):
                if in_flight.is_live:
                    await report_dead_letter(self._on_dead_letter, job, reason)
                return await self.dead_letter(in_flight, reason)
            case Nack():
                await in_flight.nack()
                return None

    async def dead_letter(self, in_flight: InFlight, reason: str) -> JobOutcome | None:
        """Publish the message unchanged to the dead-letter queue. Returns as `settle`."""
        in_flight.stage = Stage.SETTLING
        logger.warning("job_dead_lettered", message_id=in_flight.delivery.key, reason=reason)
        letter = to_dead_letter(in_flight.delivery.message, reason)
        return await self._replace(in_flight, self._topology.dead, letter, DeadLetter(reason))

    async def _delay(
        self, in_flight: InFlight, again: FetchJob, seconds: float, outcome: JobOutcome
    ) -> JobOutcome | None:
        """Publish `again` to the delay queue of `seconds`."""
        return await self._replace(in_flight, self._topology.delay(seconds), to_message(again), outcome)

    async def _replace(
        self, in_flight: InFlight, queue: str, message: Message, outcome: JobOutcome
    ) -> JobOutcome | None:
        """Publish `message` to `queue`, then acknowledge the message in flight."""
        backoff = Backoff(first=0.5, cap=5.0)
        while in_flight.is_live:
            try:
                await self._publisher.publish(queue, message)
            except JobQueueUnavailable as error:
                JOB_QUEUE_ERRORS.labels(operation="republish").inc()
                logger.warning("republish_failed", queue=queue, error=str(error))
                if self.stopping.is_set():
                    await in_flight.nack()
                    return None
                await wait_event(self.stopping, backoff.next_delay())
            else:
                return None if await in_flight.acknowledge() else Ack()
        in_flight.stage = Stage.DONE
        return outcome


class Stage(Enum):
    """How far a message in flight has come."""

    WAITING = "waiting"  # for a slot
    HANDLING = "handling"
    SETTLING = "settling"
    DONE = (
        "over"  # answered, or its delivery is lost: another delivery of the message is processed separately
    )


class InFlight:
    """A message from its first delivery to its ack or nack.

    When the broker redelivers a message whose job still runs (after a consumer timeout or a lost connection),
    `delivery` is replaced: the job runs once, and the last delivery is acknowledged.
    """

    def __init__(self, delivery: Delivery) -> None:
        self.delivery = delivery
        self.stage = Stage.WAITING

    @property
    def is_live(self) -> bool:
        """True while the broker can be answered."""
        return self.delivery.is_live

    async def acknowledge(self) -> bool:
        """Acknowledge the message. False: the delivery was lost before."""
        self.stage = Stage.DONE
        return await self.delivery.acknowledge()

    async def nack(self) -> None:
        """Return the message to its queue."""
        self.stage = Stage.DONE
        await self.delivery.nack()


class Delivery:
    """A message as one session delivered it. Once the session is lost, the broker redelivers it to any consumer."""

    def __init__(self, message: DeliveredMessage, session: Session) -> None:
        self.message = message
        self._session = session
        # Identifies the message: equal for all its deliveries.
        self.key = message.header.properties.message_id or hashlib.sha256(message.body).hexdigest()

    @property
    def is_live(self) -> bool:
        """True while the message can be acknowledged."""
        return not self._session.lost.is_set()

    async def acknowledge(self) -> bool:
        """Let the broker delete the message. False: the ack was not sent."""
        return await self._respond(self._session.amqp.basic_ack)

    async def nack(self) -> bool:
        """Let the broker redeliver the message at once, to any consumer. False: the nack was not sent."""
        return await self._respond(self._session.amqp.basic_nack)

    async def _respond(self, send: Callable[[int], Awaitable[None]]) -> bool:
        if self.is_live:
            try:
                await send(self.message.delivery_tag or 0)
                return True
            except BROKER_ERRORS as error:
                self._session.mark_lost(f"ack or nack not sent: {error!r}")
        JOB_QUEUE_ERRORS.labels(operation="ack").inc()
        logger.warning("delivery_lost", message_id=self.key)
        return False
