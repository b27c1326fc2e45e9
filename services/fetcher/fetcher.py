"""The fetcher service: takes jobs from the queue, fetches objects, and reports the outcome of each job.

It runs as a process, or beside API and evictor in standalone mode.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from math import inf

import structlog
from structlog.contextvars import bound_contextvars

from distributor_node.services.fetcher.admission import (
    Admission,
    AdmissionRules,
    Admitted,
    JobChecker,
    LeaseTimes,
)
from distributor_node.services.fetcher.download import FetchLimits
from distributor_node.services.fetcher.fetch import FetchRunner
from distributor_node.services.fetcher.scheduler import JobScheduler, Slot, SlotLimits
from distributor_node.services.fetcher.side_streams import SideStreamPlaces
from distributor_node.services.fetcher.window import WindowLimits
from distributor_node.shared.adapters.sources.client import SourceAnswer
from distributor_node.shared.adapters.sources.failover import EarlyStream, FailoverReader
from distributor_node.shared.adapters.state_common import QUEUED_SECONDS
from distributor_node.shared.adapters.volume import Volume
from distributor_node.shared.domain.conditionals import Validators
from distributor_node.shared.domain.errors import (
    ConfigurationError,
    JobQueueUnavailable,
    SourceError,
    StateStoreUnavailable,
    VolumeError,
    VolumeFull,
)
from distributor_node.shared.domain.http_caching import (
    DEFAULT_RULES,
    CachingRules,
    Validation,
    conditional_headers,
    unknown_freshness,
    validate,
    why_not_stored,
)
from distributor_node.shared.domain.jobs import (
    Ack,
    DeadLetter,
    FetchJob,
    JobOutcome,
    Nack,
    Requeue,
    Retry,
    RetryPlan,
)
from distributor_node.shared.domain.objects import ObjectId, StoredRecord
from distributor_node.shared.domain.operator_state import OperatorState
from distributor_node.shared.observability import tracing
from distributor_node.shared.observability.metrics import FETCHES, PHASE
from distributor_node.shared.ports.catalog import Catalog
from distributor_node.shared.ports.job_queue import JobQueue
from distributor_node.shared.ports.state_store import (
    Announcement,
    FailureCause,
    FetchPhase,
    Granted,
    StateStore,
    Topic,
)
from distributor_node.shared.runtime.operator_state import OperatorStateWatcher
from distributor_node.shared.runtime.process import process_name
from distributor_node.shared.runtime.threads import BlockingPool
from distributor_node.shared.settings.model import FetchSettings, Settings
from distributor_node.shared.waiting import Backoff, background

_SPARE_THREADS = 2
"""Threads for looking at the volume while every download writes and has the disk take what was written."""

_USAGE_INTERVAL = 2.0
"""Seconds between two looks at the usage, for large objects of which more may be read than viewers need."""

logger = structlog.get_logger()


def max_connections(fetch: FetchSettings) -> int:
    """Return how many connections to sources a fetcher has at once: of its downloads, and of streams beside them."""
    return SlotLimits(fetch.concurrency, fetch.concurrency_per_source).connections + fetch.side_streams


class Fetcher:
    """Consumes the job queue. The caller opens and closes the adapters."""

    def __init__(
        self,
        settings: Settings,
        state: StateStore,
        queue: JobQueue,
        volume: Volume,
        catalog: Catalog,
        failover_reader: FailoverReader,
        *,
        shares_loop: bool = False,
    ) -> None:
        """`shares_loop`: the event loop serves clients too, and must never wait for the disk."""
        fetch, storage = settings.fetch, settings.storage
        self._shares_loop = shares_loop
        self._state = state
        self._queue = queue
        self._volume = volume
        self._slot_limits = SlotLimits(fetch.concurrency, fetch.concurrency_per_source)
        self._consuming = False
        self._disk = BlockingPool(2 * fetch.concurrency + _SPARE_THREADS)
        self.name = process_name()
        rules = AdmissionRules(
            storage.largest_cached_size, fetch.space_wait, fetch.lease, storage.watermarks.low
        )
        times = LeaseTimes(fetch.lease, fetch.lease_renewal)
        self._side_streams = SideStreamPlaces(fetch.side_streams)
        window, public = None, settings.public_api
        if fetch.window is not None and public.follow_growing_files:  # else no viewer follows a fetch
            window = WindowLimits(
                fetch.window,
                fetch.window_above,
                public.far_range_distance,
                fetch.viewer_timeout,
                self._has_spare_time,
            )
        limits = FetchLimits(
            storage.largest_cached_size, fetch.space_wait, settings.caching_rules, self._side_streams, window
        )
        # A pass of the evictor ends at the low watermark, so a full cache is often just below it.
        self._ample_below = 2 * storage.watermarks.low - storage.watermarks.high
        self._taken, self._taken_at = 0, -inf  # bytes used and reserved, and when they were read
        self._worker = Worker(
            Admission(state, volume, self._disk, rules, self.name),
            FetchRunner(state, volume, failover_reader, self._disk, times, limits),
            FailureRecorder(state, RetryPlan(settings.job_queue.retry_delays), fetch.failure_memory),
        )
        self._revalidator = Revalidator(
            state, volume, self._disk, failover_reader, catalog, settings.caching_rules or DEFAULT_RULES
        )
        self._scheduler = JobScheduler(
            state, self.name, self._slot_limits, failover_reader.worth_downloading_from
        )
        self._operator_state = OperatorStateWatcher(state, volume.root, settings.assignment)
        self._checker = JobChecker(
            catalog,
            state,
            lambda: self._operator_state.assignment,
            max_age=sum(settings.job_queue.retry_delays) + QUEUED_SECONDS,
        )
        self._dead_letter_handler = DeadLetterHandler(
            state, volume, self._disk, self.name, fetch.failure_memory
        )

    async def serve(self) -> None:
        """Handle jobs until cancelled. Then nack every running job and keep its partial file.

        Raises ConfigurationError if the volume cannot be written.
        """
        try:
            await self._disk.run(self._volume.prepare)
            if self._side_streams.most:
                await self._try_holes()
            if not self._shares_loop and await self._disk.run(self._volume.is_on_local_disk):
                self._disk.keep_short_calls_in_loop()
        except VolumeError as error:
            raise ConfigurationError(f"storage.path: {error}") from error
        await self._operator_state.load()
        try:
            async with (
                background(self._operator_state.run(), "fetcher-operator-state"),
                background(self._scheduler.run(), "fetcher-scheduler"),
            ):
                self._consuming = True
                limits = self._slot_limits
                logger.info("fetcher_started", worker=self.name, concurrency=limits.total)
                handle = self._handle if tracing.installed_tracer() is None else self._handle_traced
                await self._queue.consume(handle, limits.held, self._dead_letter_handler.handle)
        finally:
            self._consuming = False
            await self._disk.close()

    async def _try_holes(self) -> None:
        """No side streams where files cannot be sparse, or a full disk does not let that be tried out."""
        try:
            reason = "" if await self._disk.run(self._volume.has_holes) else "expected holes to take no space"
        except VolumeFull as error:
            reason = str(error)
        if reason:
            logger.warning("partial_files_not_sparse", reason=f"storage.path: {reason}")
            self._side_streams.most = 0

    async def _handle(self, job: FetchJob) -> JobOutcome:
        """Hold new jobs while the node drains, so that no other worker takes them. Running fetches go on."""
        try:
            if job.revalidates is not None:
                return await self._revalidate(job)
            await self._operator_state.wait_until(_not_draining)
            with bound_contextvars(object_id=job.object_id, request_id=job.request_id):
                checked = await self._checker.check(job)
                if not isinstance(checked, FetchJob):
                    FETCHES.labels(outcome_label(checked)).inc()
                    return checked
                async with self._scheduler.slot(checked) as slot:
                    return await self._worker.handle(checked, slot) if isinstance(slot, Slot) else slot
        except asyncio.CancelledError:
            return Nack()

    async def _handle_traced(self, job: FetchJob) -> JobOutcome:
        """As `_handle`, in a span of the trace of the request that published the job."""
        with (
            tracing.span(
                "fetch" if job.revalidates is None else "revalidation",
                "consumer",
                parent=job.trace,
                attributes={
                    "distributor.object_id": job.object_id,
                    "distributor.request_id": job.request_id,
                    "distributor.attempt": job.attempt,
                    "distributor.size": job.media_object.size,
                },
            ) as span,
            bound_contextvars(**({"trace_id": span.trace_id} if span.trace_id else {})),
        ):
            if job.attempt == 1:
                with tracing.span("queue_wait", started=job.published_at):
                    pass  # it ends now
            outcome = await self._handle(job)
            span.set("distributor.outcome", outcome_label(outcome))
            if isinstance(outcome, Retry | DeadLetter):
                span.fail(outcome.reason)
            return outcome

    async def _revalidate(self, job: FetchJob) -> JobOutcome:
        """A job without a live claim is outdated: the next request for the stale object publishes another one."""
        if await self._checker.is_live(job):
            return await self._revalidator.handle(job)
        FETCHES.labels("revalidation_outdated").inc()
        return Ack("revalidation_outdated")

    async def _has_spare_time(self, slot: Slot | None) -> bool:
        """Whether all of an object may be read, although no viewer is near: no job waits, and no object has to go."""
        if not self._scheduler.has_spare_slot(slot):
            return False
        now = time.monotonic()
        if now - self._taken_at >= _USAGE_INTERVAL:
            usage = await self._state.usage()
            self._taken, self._taken_at = usage.used + usage.reserved, now
        return self._taken <= self._ample_below

    async def problems(self) -> Sequence[str]:
        """Return why the fetcher is not ready, in words. Empty: it is ready."""
        if not self._consuming:
            return ["not consuming jobs"]
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


class Worker:
    """Handles jobs, any number at once: admission, fetch, outcome. A job may run twice or be lost half way."""

    def __init__(
        self, admission: Admission, fetch_runner: FetchRunner, failure_recorder: FailureRecorder
    ) -> None:
        self._admission = admission
        self._fetch_runner = fetch_runner
        self._failure_recorder = failure_recorder
        self._queue_wait = PHASE.labels("queue_wait")

    async def handle(self, job: FetchJob, slot: Slot | None = None) -> JobOutcome:
        """Handle one job for the queue. When cancelled, release the lease and return Nack.

        `slot`: the source to begin with, and where the source in use is counted.
        """
        if job.attempt == 1:
            self._queue_wait.observe(max(0.0, time.time() - job.published_at))
        began_at = time.monotonic()
        try:
            outcome = await self._fetch(job, slot)
        except asyncio.CancelledError:
            outcome = Nack()
        label = outcome_label(outcome)
        FETCHES.labels(label).inc()
        logger.info(
            "job_ended",
            outcome=label,
            reason=getattr(outcome, "reason", None),
            attempt=job.attempt,
            size=job.media_object.size,
            seconds=round(time.monotonic() - began_at, 3),
        )
        return outcome

    async def _fetch(self, job: FetchJob, slot: Slot | None) -> JobOutcome:
        early = self._fetch_runner.ask_early(job, None if slot is None else slot.url)
        if early is None:
            return await self._fetch_under_lease(job, slot, None)
        try:
            return await self._fetch_under_lease(job, slot, early)
        finally:
            await early.close()

    async def _fetch_under_lease(
        self, job: FetchJob, slot: Slot | None, early: EarlyStream | None
    ) -> JobOutcome:
        outcome: JobOutcome
        try:
            with tracing.span("lease", current=False):
                admitted = await self._admission.admit(
                    job.media_object,
                    warming=job.low_priority and not job.copy,
                    claim=job.claim,
                    on_refused=None if early is None else partial(self._fetch_runner.give_up_early, early),
                )
            if isinstance(admitted, Admitted):
                if slot is not None:
                    slot.take_room()
                record_failure = partial(self._failure_recorder.record, job)
                return await self._fetch_runner.run(
                    job.media_object,
                    admitted,
                    record_failure,
                    slot,
                    peer_use=job.peer_use,
                    ordered=job.low_priority,
                    early=early,
                )
            outcome = admitted
        except (StateStoreUnavailable, VolumeError) as error:
            outcome = Retry(str(error))
        if isinstance(outcome, Retry):
            await self._failure_recorder.record(job, outcome.reason)
        return outcome


def outcome_label(outcome: JobOutcome) -> str:
    """Return the value of the metric label: one of a few words."""
    match outcome:
        case Ack(detail):
            return detail
        case Retry():
            return "retry"
        case Requeue():
            return "requeue"
        case DeadLetter():
            return "dead_letter"
        case Nack():
            return "nack"


# Revalidation: is an object of an HTTP origin still current? (RFC 9111 section 4.3)

REVALIDATION_PAUSE = 5.0
"""Seconds for which an origin that could not be asked about an object is not asked about it again."""

_REMOVAL_WAIT = 3.0
"""Seconds to wait for the evictor."""

_MAX_REVALIDATIONS = 32
"""At once, per process. They are short and take no slot of a download."""


class Revalidator:
    """Carries out jobs that ask an origin about one stored object.

    The object is refreshed, or purged because it was replaced or is gone. If the origin cannot be asked, that is
    recorded as a failure, which requests see. Then the claim of the job is released.
    """

    def __init__(
        self,
        state: StateStore,
        volume: Volume,
        disk: BlockingPool,
        failover_reader: FailoverReader,
        catalog: Catalog,
        rules: CachingRules,
    ) -> None:
        self._state = state
        self._catalog = catalog
        self._volume = volume
        self._disk = disk
        self._failover_reader = failover_reader
        self._rules = rules
        self._slots = asyncio.Semaphore(_MAX_REVALIDATIONS)

    async def handle(self, job: FetchJob) -> JobOutcome:
        """Ask once. The next request for the object starts another attempt."""
        with bound_contextvars(object_id=job.object_id, request_id=job.request_id):
            began_at = time.monotonic()
            try:
                async with self._slots:
                    detail = await self._revalidate(job)
                await self._release_claim(job)
            except (StateStoreUnavailable, VolumeError) as error:
                logger.warning("revalidation_failed", reason=str(error))
                detail = "revalidation_failed"
            FETCHES.labels(detail).inc()
            seconds = round(time.monotonic() - began_at, 3)
            logger.info("job_ended", outcome=detail, attempt=job.attempt, seconds=seconds)
            return Ack(detail)

    async def _revalidate(self, job: FetchJob) -> str:
        """Return what was found, as a label of the metrics."""
        record = await self._disk.run(self._volume.complete_record, job.object_id)
        if record is None or record.content_hash is not None:
            return "revalidation_needless"
        if record.freshness is not None and record.freshness.checked_at > (job.revalidates or 0.0):
            return "revalidation_needless"  # a redelivered job, or one that was published by a second claim
        try:
            received_at, answer = await self._ask(job, record)
        except SourceError as error:
            return await self._fail(job, str(error))
        received = Validators.from_headers(answer.headers)
        match validate(record.validators, answer.status, received):
            case Validation.UNCHANGED if why_not_stored(200, answer.headers) is None:
                await self._refresh(record, received_at, answer)
                return "revalidated"
            case Validation.FAILED:
                return await self._fail(job, f"responded {answer.status}")
            case Validation.GONE:
                await self._purge(record)
                return "revalidation_gone"
        await self._purge(record)
        return "revalidation_replaced"

    async def _ask(self, job: FetchJob, record: StoredRecord) -> tuple[float, SourceAnswer]:
        """Return the answer and the POSIX time of its arrival. Raises SourceError."""
        failure: SourceError | None = None
        # Not what the message says: a path of which the id is no digest is not believed.
        for url in self._catalog.sources_of(job.object_id.with_path(job.media_object.name)):
            try:
                answer = await self._failover_reader.ask(url, conditional_headers(record.validators))
                return time.time(), answer
            except SourceError as error:
                failure = error
        raise failure or SourceError("the object has no source")

    async def _refresh(self, record: StoredRecord, received_at: float, answer: SourceAnswer) -> None:
        known = record.freshness or unknown_freshness(record.stored_at)
        freshness = known.refreshed(answer.headers, record.validators, received_at, answer.delay, self._rules)
        await self._disk.run(self._rewrite, record, replace(record, freshness=freshness))

    def _rewrite(self, known: StoredRecord, refreshed: StoredRecord) -> None:
        """Replace the record, unless the object has been removed or replaced since. Blocking."""
        file = self._volume.open_object(known.object_id)
        if file is None:
            return
        with closing(file):
            if file.record == known and file.lock_shared():  # locked: it is not removed in between
                self._volume.write_record(refreshed)

    async def _purge(self, record: StoredRecord) -> None:
        """Have the evictor remove the object, and wait for that while the claim keeps others from asking, too."""
        await self._state.request_purges([record.object_id])
        poll = Backoff(0.02, 0.25, jitter=False)
        deadline = time.monotonic() + _REMOVAL_WAIT
        while time.monotonic() < deadline:
            if await self._disk.run(self._volume.complete_record, record.object_id) != record:
                return
            await poll.wait()
        logger.warning("purge_pending", seconds=_REMOVAL_WAIT)

    async def _fail(self, job: FetchJob, reason: str) -> str:
        logger.info("revalidation_failed", reason=reason)
        await self._state.record_failure(
            job.object_id, f"not revalidated: {reason}"[:500], REVALIDATION_PAUSE
        )
        return "revalidation_failed"

    async def _release_claim(self, job: FetchJob) -> None:
        await self._state.release_claim(job.object_id, None, job.claim)
        await self._state.announce(Announcement(Topic.FETCH_CHANGED, job.object_id))


class FailureRecorder:
    """Negative caching: while a job waits for its next attempt, its object is marked as failed.

    Otherwise every request for a failing object would publish another job, each with all its attempts.
    """

    def __init__(self, state: StateStore, plan: RetryPlan, failure_memory: float) -> None:
        """`failure_memory`: seconds that the failure of the last attempt is remembered."""
        self._state, self._plan, self._failure_memory = state, plan, failure_memory

    async def record(
        self,
        job: FetchJob,
        reason: str,
        cause: FailureCause = FailureCause.OTHER,
        last: bool = False,
    ) -> None:
        """Record a failed attempt. Call it before the lease is released: requests wait for that and then claim.

        `last`: no other attempt follows.

        The mark lasts until the delayed job has had the time of a new job to begin. After that, if the job was lost,
        the object can be claimed again.
        """
        delay = None if last else self._plan.next_delay(job.attempt)
        seconds = self._failure_memory if delay is None else delay + QUEUED_SECONDS
        try:
            await self._state.record_failure(job.object_id, reason, seconds, cause)
        except StateStoreUnavailable as error:
            logger.info("failure_not_recorded", reason=str(error))


class DeadLetterHandler:
    """The job queue's dead-letter callback: records the failure, deletes the partial file, releases its space.

    A partial object that was parked with no more than it holds stays, for whatever reason its job has ended: there was
    no room for the rest, no source sent it, or the catalog was away. None of these says anything against the bytes that
    are here. A fetch that finds wrong bytes discards them itself, before its job ends. The evictor keeps the partial
    object in its order, and the next job continues it, if it is of the version that the catalog then names.
    """

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
        """Clean up after a job that is dead-lettered."""
        with bound_contextvars(object_id=job.object_id, request_id=job.request_id):
            logger.warning("fetch_dead_lettered", reason=reason, attempts=job.attempt)
            try:
                # The failure first: a request that sees the end of the fetch must find its reason.
                known = (await self._state.find(job.object_id)).failure
                cause = known.cause if known is not None and known.reason == reason else FailureCause.OTHER
                await self._state.record_failure(job.object_id, reason, self._failure_memory, cause)
                # Of a job that never began: its claim would count as waiting until it counts as lost. Race: 1. the
                # job is late, and counts as lost; 2. another claim wins; 3. the job ends. That claim stays: its own
                # job is in the queue.
                await self._state.release_claim(job.object_id, None, job.claim)
                await self._remove_partial(job.object_id)
            except (StateStoreUnavailable, VolumeError) as error:
                logger.warning("dead_letter_cleanup_failed", reason=str(error))

    async def _remove_partial(self, object_id: ObjectId) -> None:
        """Delete a parked partial file under a lease of its own, unless no more is reserved than it holds."""
        fetch = (await self._state.find(object_id)).fetch
        sidecar = await self._disk.run(self._volume.partial_record, object_id)
        if fetch is None or fetch.phase is not FetchPhase.PARKED or fetch.is_shrunk or sidecar is None:
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
    """Open and discard in one call, so that a cancellation leaves no open file. Blocking."""
    volume.open_partial_for_writing(sidecar, write_sidecar=False).discard()
