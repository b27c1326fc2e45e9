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
from shared.adapters.queue_rabbitmq.deliveries import Custody, Delivery, Settlement, Stage
from shared.adapters.queue_rabbitmq.messages import to_job
from shared.adapters.queue_rabbitmq.topology import Topology
from shared.domain.errors import InvalidJob
from shared.domain.jobs import FetchJob
from shared.observability.metrics import JOB_QUEUE_ERRORS
from shared.ports.job_queue import JobHandler

log = structlog.get_logger()

_DECLARE_SECONDS = 10.0

# Endings of jobs whose delivery was lost, kept until the broker delivers them again (to this process or another).
_MOST_OWED = 1000


class Consumer:
    """Runs handlers for the work queue, until cancelled. What is no broker trouble ends `run` with its exception."""

    def __init__(
        self, url: str, topology: Topology, settlement: Settlement, handler: JobHandler, concurrency: int
    ) -> None:
        self._url = url
        self._topology = topology
        self._settlement = settlement
        self._handler = handler
        self._concurrency = concurrency
        self._slots = asyncio.Semaphore(concurrency)
        self._custody: dict[str, Custody] = {}
        self._owed: dict[str, Ending] = {}
        self._tasks: dict[asyncio.Task[None], Custody] = {}
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
                        log.error("consumer_cannot_connect", reason=reported)
                await backoff.wait()
        finally:
            await self._stop_handlers()

    async def _serve_one_session(self, backoff: Backoff) -> None:
        async with open_session(self._url, "distributor consumer", confirms=False) as session:
            tag = await self._begin(session)
            log.info("consuming", queue=self._topology.work, concurrency=self._concurrency)
            backoff.reset()
            try:
                await self._until_lost(session)
            except asyncio.CancelledError:
                # The channel stays open until the handlers have ended, so that what they finish is acknowledged.
                await self._cancel(session, tag)
                await self._stop_handlers()
                raise
            finally:
                session.lose("closed")
            log.warning("consumer_session_lost", why=session.why, still_running=len(self._tasks))

    async def _begin(self, session: Session) -> str:
        async with asyncio.timeout(_DECLARE_SECONDS):
            await session.channel.set_qos(prefetch_count=self._concurrency)
            await self._topology.declare(session.channel)
            queue = await session.channel.get_queue(self._topology.work, ensure=False)

            async def take(message: AbstractIncomingMessage) -> None:
                self._take(Delivery(message, session))

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

    def _take(self, delivery: Delivery) -> None:
        known = self._custody.get(delivery.key)
        is_known = known is not None and known.stage is not Stage.OVER
        if known is not None and is_known and not known.is_live:
            log.info("delivered_again_while_running", message_id=delivery.key)
            known.delivery = delivery
            return
        custody = Custody(delivery)
        task = asyncio.create_task(self._keep(custody), name=f"job-{delivery.key}")
        self._tasks[task] = custody
        if not is_known:
            self._custody[delivery.key] = custody
        task.add_done_callback(self._forget)

    def _forget(self, task: asyncio.Task[None]) -> None:
        custody = self._tasks.pop(task)
        if self._custody.get(custody.delivery.key) is custody:
            del self._custody[custody.delivery.key]
        error = None if task.cancelled() else task.exception()
        if error is not None and not self._broken.done():
            self._broken.set_exception(error)

    async def _keep(self, custody: Custody) -> None:
        """One message, from delivery to answer."""
        try:
            job = to_job(custody.delivery.message)
        except InvalidJob as error:
            await self._settlement.bury(custody, f"no job: {error}")
            return
        owed = self._owed.pop(custody.delivery.key, None)
        if owed is not None:
            await self._settle(custody, job, owed)
            return
        try:
            async with self._slots:
                if custody.is_live and not self._settlement.stopping.is_set():
                    custody.stage = Stage.HANDLING
                    outcome = await handle(self._handler, job, self._settlement.stopping.is_set)
                    await self._settle(custody, job, decide_ending(job, outcome, self._topology.plan))
        except asyncio.CancelledError:
            log.debug("job_not_begun", object_id=job.object_id)
        if custody.stage is not Stage.OVER:
            await custody.put_back()

    async def _settle(self, custody: Custody, job: FetchJob, ending: Ending) -> None:
        owed = await self._settlement.settle(custody, job, ending)
        if owed is not None:
            self._owed[custody.delivery.key] = owed
            while len(self._owed) > _MOST_OWED:
                del self._owed[next(iter(self._owed))]

    async def _cancel(self, session: Session, tag: str) -> None:
        """Have the broker send no more; what came meanwhile is put back."""
        self._settlement.stopping.set()
        if not session.lost.is_set():
            try:
                async with asyncio.timeout(CLOSE_SECONDS):
                    await (await session.channel.get_underlay_channel()).basic_cancel(tag)
            except BROKER_ERRORS as error:
                session.lose(f"cancel failed: {error!r}")

    async def _stop_handlers(self) -> None:
        """Cancel what runs or waits for a slot, let what is being settled settle, wait for all of it."""
        self._settlement.stopping.set()
        for task, custody in self._tasks.items():
            if custody.stage in {Stage.WAITING, Stage.HANDLING}:
                task.cancel()
        if self._tasks:
            await asyncio.wait(list(self._tasks))
