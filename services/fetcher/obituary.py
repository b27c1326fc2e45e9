"""What is done when a job is given up."""

from __future__ import annotations

import structlog
from structlog.contextvars import bound_contextvars

from services.fetcher.disk import BlockingPool
from shared.adapters.volume import Volume
from shared.domain.errors import StateStoreUnavailable, VolumeError
from shared.domain.jobs import FetchJob
from shared.domain.objects import ObjectId, StoredRecord
from shared.ports.state_store import FetchPhase, Granted, StateStore

logger = structlog.get_logger()


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
