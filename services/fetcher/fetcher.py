"""The fetcher as a task: in a process of its own, or beside API and evictor in standalone mode."""

from __future__ import annotations

import asyncio
import os
import socket
import uuid
from collections.abc import Sequence

import structlog

from services.fetcher.admission import Admission, AdmissionRules
from services.fetcher.disk import BlockingPool
from services.fetcher.download import FetchDeps
from services.fetcher.lease_keeper import LeaseTimes
from services.fetcher.obituary import DeadLetterHandler
from services.fetcher.postponement import FailureRecorder
from services.fetcher.retrieval import FetchRunner
from services.fetcher.worker import Worker
from shared.adapters.sources.relay import FailoverReader
from shared.adapters.volume import Volume
from shared.domain.errors import (
    ConfigurationError,
    JobQueueUnavailable,
    StateStoreUnavailable,
    VolumeError,
)
from shared.domain.jobs import FetchJob, HandBack, JobOutcome, RetryPlan
from shared.domain.orders import OperatorState
from shared.ports.job_queue import JobQueue
from shared.ports.state_store import StateStore
from shared.runtime.orders import OperatorStateWatcher
from shared.settings.model import Settings

_SPARE_THREADS = 2  # for looking at the volume while every download writes

logger = structlog.get_logger()


class Fetcher:
    """Everything given is open, or will be before `serve`, and is closed by whoever gave it."""

    def __init__(
        self,
        settings: Settings,
        state: StateStore,
        queue: JobQueue,
        volume: Volume,
        failover_reader: FailoverReader,
    ) -> None:
        fetch = settings.fetch
        self._state = state
        self._queue = queue
        self._volume = volume
        self._concurrency = fetch.concurrency
        self._consuming = False
        self._disk = BlockingPool(fetch.concurrency + _SPARE_THREADS)
        self.name = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        storage = settings.storage
        rules = AdmissionRules(
            storage.largest_cached_size, fetch.space_wait, fetch.lease, storage.watermarks.low
        )
        times = LeaseTimes(fetch.lease, fetch.lease_renewal)
        self._worker = Worker(
            Admission(state, volume, self._disk, rules, self.name),
            FetchRunner(FetchDeps(state, failover_reader, self._disk), volume, times),
            FailureRecorder(state, RetryPlan(settings.job_queue.retry_delays), fetch.failure_memory),
        )
        self._operator_state = OperatorStateWatcher(state, volume.root, settings.assignment)
        self._dead_letter_handler = DeadLetterHandler(
            state, volume, self._disk, self.name, fetch.failure_memory
        )

    async def serve(self) -> None:
        """Handle jobs until cancelled; then every job under way is given back, with its partial file kept.

        ConfigurationError if the volume cannot be written.
        """
        try:
            await self._disk.run(self._volume.prepare)
        except VolumeError as error:
            raise ConfigurationError(f"storage.path: {error}") from error
        await self._operator_state.load()
        watching = asyncio.create_task(self._operator_state.run(), name="fetcher-operator-state")
        self._consuming = True
        try:
            logger.info("fetcher_started", worker=self.name, concurrency=self._concurrency)
            await self._queue.consume(self._handle, self._concurrency, self._dead_letter_handler.handle)
        finally:
            self._consuming = False
            watching.cancel()
            await asyncio.wait({watching})
            await self._disk.close()

    async def _handle(self, job: FetchJob) -> JobOutcome:
        """While the node drains, jobs are held: nobody else is to take them either. Fetches under way go on."""
        try:
            await self._operator_state.wait_until(_not_draining)
        except asyncio.CancelledError:
            return HandBack()
        return await self._worker.handle(job)

    async def problems(self) -> Sequence[str]:
        """What keeps it from working, in words; nothing: it is ready."""
        if not self._consuming:
            return ["no jobs are taken"]
        found = []
        try:
            await self._state.ping()
        except StateStoreUnavailable as error:
            found.append(f"state store: {error}")
        try:
            await self._queue.ping()
        except JobQueueUnavailable as error:
            found.append(f"job queue: {error}")
        try:
            await self._disk.run(self._volume.check)
        except VolumeError as error:
            found.append(f"volume: {error}")
        return found


def _not_draining(state: OperatorState) -> bool:
    return not state.draining
