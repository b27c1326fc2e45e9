"""Taking jobs: one session after another, and handlers that outlive a lost session."""

from __future__ import annotations

import asyncio
from typing import Any

import structlog
from aio_pika.abc import AbstractIncomingMessage

from shared.adapters.queue_outcomes import Ending, decide_ending, handle
from shared.adapters.queue_rabbitmq.connection import (
    BROKER_ERRORS,
    CLOSE_SECONDS,
    Backoff,
    Session,
    open_session,
)
from shared.adapters.queue_rabbitmq.deliveries import Delivery, InFlight, Settler, Stage
from shared.adapters.queue_rabbitmq.messages import to_job
from shared.adapters.queue_rabbitmq.topology import Topology
from shared.domain.errors import InvalidJob
from shared.domain.jobs import FetchJob
from shared.observability.metrics import JOB_QUEUE_ERRORS
from shared.ports.job_queue import JobHandler

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
