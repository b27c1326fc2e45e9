"""The fetcher as a task: in a process of its own, or beside API and evictor in standalone mode."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from functools import partial

import structlog
from structlog.contextvars import bound_contextvars

from distributor_node.services.fetcher.admission import Admission, AdmissionRules, Admitted
from distributor_node.services.fetcher.download import FetchDeps, FetchRunner
from distributor_node.services.fetcher.lease import LeaseTimes
from distributor_node.shared.adapters.sources.failover import FailoverReader
from distributor_node.shared.adapters.state_common import QUEUED_SECONDS
from distributor_node.shared.adapters.volume import Volume
from distributor_node.shared.domain.errors import (
    ConfigurationError,
    JobQueueUnavailable,
    StateStoreUnavailable,
    VolumeError,
)
from distributor_node.shared.domain.jobs import (
    Done,
    FetchJob,
    HandBack,
    Hopeless,
    JobOutcome,
    LookAgain,
    RetryPlan,
    TryLater,
)
from distributor_node.shared.domain.objects import ObjectId, StoredRecord
from distributor_node.shared.domain.operator_state import OperatorState
from distributor_node.shared.observability.metrics import FETCHES, PHASE
from distributor_node.shared.ports.job_queue import JobQueue
from distributor_node.shared.ports.state_store import FetchPhase, Granted, StateStore
from distributor_node.shared.runtime.operator_state import OperatorStateWatcher
from distributor_node.shared.runtime.run_service import process_name
from distributor_node.shared.runtime.threads import BlockingPool
from distributor_node.shared.settings.model import Settings

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
        self.name = process_name()
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


# One job, from its arrival to its outcome.


class Worker:
    """Handles any number of jobs at once. Safe to run twice, and to lose half way."""

    def __init__(
        self, admission: Admission, fetch_runner: FetchRunner, failure_recorder: FailureRecorder
    ) -> None:
        self._admission = admission
        self._fetch_runner = fetch_runner
        self._failure_recorder = failure_recorder

    async def handle(self, job: FetchJob) -> JobOutcome:
        """The job queue's handler. A cancellation is answered with HandBack, with everything left in good order."""
        with bound_contextvars(object_id=job.object_id, request_id=job.request_id):
            if job.attempt == 1:
                PHASE.labels("queue_wait").observe(max(0.0, time.time() - job.published_at))
            began_at = time.monotonic()
            try:
                outcome = await self._fetch(job)
            except asyncio.CancelledError:
                outcome = HandBack()
            FETCHES.labels(outcome_label(outcome)).inc()
            logger.info(
                "job_ended",
                outcome=outcome_label(outcome),
                reason=getattr(outcome, "reason", None),
                attempt=job.attempt,
                size=job.media_object.size,
                seconds=round(time.monotonic() - began_at, 3),
            )
            return outcome

    async def _fetch(self, job: FetchJob) -> JobOutcome:
        outcome: JobOutcome
        try:
            admitted = await self._admission.admit(job.media_object, warming=job.low_priority)
            if isinstance(admitted, Admitted):
                record_failure = partial(self._failure_recorder.record, job)
                return await self._fetch_runner.run(
                    job.media_object, admitted.lease, admitted.requested_at, record_failure
                )
            outcome = admitted
        except (StateStoreUnavailable, VolumeError) as error:
            outcome = TryLater(str(error))
        if isinstance(outcome, TryLater):
            await self._failure_recorder.record(job, outcome.reason)
        return outcome


def outcome_label(outcome: JobOutcome) -> str:
    """One of a few words, for metrics."""
    match outcome:
        case Done(detail):
            return detail.replace(",", "").replace(" ", "_")
        case TryLater():
            return "retry"
        case LookAgain():
            return "requeue"
        case Hopeless():
            return "dead_letter"
        case HandBack():
            return "nack"


# Between two attempts of a job nobody starts the fetch anew: the job waits, its object counts as failed.


class FailureRecorder:
    """Without it every request for a failing object would publish a job of its own, each with all its attempts.

    `failure_memory`: seconds that the failure of a last attempt is remembered."""

    def __init__(self, state: StateStore, plan: RetryPlan, failure_memory: float) -> None:
        self._state, self._plan, self._failure_memory = state, plan, failure_memory

    async def record(self, job: FetchJob, reason: str) -> None:
        """One attempt has failed. To be told before the lease is given back: who waits for that asks at once.

        A job that comes back does so after its delay, and begins within the time that a new one is given; one that was
        lost keeps nobody from claiming the object after that.
        """
        delay = self._plan.next_delay(job.attempt)
        seconds = self._failure_memory if delay is None else delay + QUEUED_SECONDS
        try:
            await self._state.record_failure(job.object_id, reason, seconds)
        except StateStoreUnavailable as error:
            logger.info("failure_not_recorded", reason=str(error))


# What is done when a job is given up.


class DeadLetterHandler:
    """Frees what the attempts held, and has the failure remembered."""

    def __init__(
        self, state: StateStore, volume: Volume, disk: BlockingPool, worker: str, failure_memory: float
    ) -> None:
        """`failure_memory`: seconds that the failure is remembered."""
        self._state = state
        self._volume = volume
        self._disk = disk
        self._worker = worker
        self._failure_memory = failure_memory

    async def handle(self, job: FetchJob, reason: str) -> None:
        """The job queue's callback: free the space that the attempts held, and remember the failure."""
        with bound_contextvars(object_id=job.object_id, request_id=job.request_id):
            logger.warning("fetch_dead_lettered", reason=reason, attempts=job.attempt)
            try:
                # In this order: who sees the fetch end must see why.
                await self._state.record_failure(job.object_id, reason, self._failure_memory)
                await self._remove_partial(job.object_id)
            except (StateStoreUnavailable, VolumeError) as error:
                logger.warning("dead_letter_cleanup_failed", reason=str(error))

    async def _remove_partial(self, object_id: ObjectId) -> None:
        fetch = (await self._state.find(object_id)).fetch
        sidecar = await self._disk.run(self._volume.partial_record, object_id)
        if fetch is None or fetch.phase is not FetchPhase.PARKED or sidecar is None:
            return
        result = await self._state.begin(object_id, fetch.size, self._worker)
        if not isinstance(result, Granted):
            return
        try:
            await self._disk.run(_discard, self._volume, sidecar)
        except VolumeError:
            await self._state.park(result.lease)
            raise
        await self._state.release(result.lease)


def _discard(volume: Volume, sidecar: StoredRecord) -> None:
    """In one call: whoever is cancelled meanwhile leaves no open file behind. Blocks."""
    volume.open_partial_for_writing(sidecar, write_sidecar=False).discard()
