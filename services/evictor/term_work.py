"""What a leader does during one term, each kind of work in its own rhythm."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import structlog

from services.evictor.copying import Copying
from services.evictor.duty import DutyCheck
from services.evictor.eviction import Eviction
from services.evictor.file_calls import run_blocking
from services.evictor.index import EvictionIndex
from services.evictor.order_keeping import OperatorStateBackup, PurgeWork
from services.evictor.pacing import repeat
from services.evictor.partials import Partials
from services.evictor.reconcile import Reconciliation
from services.evictor.removals import Removals
from services.evictor.repair import Repair
from services.evictor.scrub import Scrub
from services.evictor.source_watch import SourceWatch
from services.evictor.takeover import Takeover
from shared.adapters.volume import Volume
from shared.domain.errors import CatalogUnavailable, DistributorError, StateStoreUnavailable
from shared.domain.objects import ObjectId
from shared.domain.space import Usage
from shared.ports.state_store import StateStore, Term, Topic
from shared.runtime.orders import POLL_INTERVAL
from shared.settings.model import EvictorSettings

REFRESH_SECONDS, SAVE_SECONDS, SWEEP_SECONDS = 1.0, 5.0, 10.0
_COMPLETED_AT_ONCE = 100
_FREED_MOST = 10_000  # objects to look at again in one sweep; reconciliation sees to what goes beyond
_RESYNC_SECONDS = 5.0  # least time between two comparisons of all entries because of a doubt
_LIST_AGAIN = 600.0  # seconds until the whole list, which is dear, is asked for again after a failure
_CATALOG_SECONDS = 60.0  # between attempts while the catalog is out of reach
_LONGEST_UNSETTLED = 60.0  # seconds between attempts to bring volume and store together

Step = Callable[[], Awaitable[float | None]]

logger = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Tools:
    """All that the work is done with; outlives terms."""

    volume: Volume
    index: EvictionIndex
    removals: Removals
    partials: Partials
    eviction: Eviction
    reconciliation: Reconciliation
    repair: Repair
    duty: DutyCheck
    scrub: Scrub
    operator_state: OperatorStateBackup
    purges: PurgeWork
    sources: SourceWatch | None
    takeover: Takeover | None
    copying: Copying | None


class TermWork:
    """`run` until cancelled. `confirm` is called when the store seems to have lost its memory, our term included."""

    def __init__(
        self,
        term: Term,
        state: StateStore,
        tools: Tools,
        settings: EvictorSettings,
        confirm: Callable[[], None],
    ) -> None:
        self._term, self._state, self._tools, self._settings = term, state, tools, settings
        self._confirm = confirm
        self._look, self._reconcile_now, self._repair_now = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._taken_over, self._duty_now = asyncio.Event(), asyncio.Event()
        self._operator_state_event, self._purge_now = asyncio.Event(), asyncio.Event()
        self._freed: set[ObjectId] = set()
        self._settled = False
        self._replacements = tools.volume.replacements
        self._unsettled_runs = 0
        self._in_doubt = False
        self._resynced_at, self._saved_at = -math.inf, time.monotonic()

    async def run(self) -> None:
        """Never returns; errors that are not worth retrying pass through, as an ExceptionGroup."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._listen(), name="evictor-listen")
                group.create_task(self._repeat("take over", self._take_over), name="evictor-take-over")
                await self._taken_over.wait()
                for name, step, wake in self._works():
                    group.create_task(self._repeat(name, step, wake), name=f"evictor-{name}")
        finally:
            await self._last_words()

    def _works(
        self,
    ) -> list[tuple[str, Step, asyncio.Event | None]]:
        works: list[tuple[str, Step, asyncio.Event | None]] = [
            ("make room", self._make_room, self._look),
            ("keep index", self._keep_index, None),
            ("reconcile", self._reconcile, self._reconcile_now),
            ("sweep", self._sweep, None),
            ("repair", self._repair, self._repair_now),
            ("check duty", self._check_duty, self._duty_now),
            ("keep orders", self._back_up_operator_state, self._operator_state_event),
            ("purge", self._purge, self._purge_now),
        ]
        if self._settings.scrub_rate:
            works.append(("scrub", self._scrub, None))
        if self._tools.copying is not None:
            works.append(("copy assets", self._copy, None))
        if self._tools.sources is not None:
            works.append(("watch sources", self._tools.sources.step, None))
        return works

    async def _repeat(self, name: str, step: Step, wake: asyncio.Event | None = None) -> None:
        await repeat(name, step, wake, self._doubt)

    def _doubt(self, error: DistributorError) -> None:
        """A verb whose answer was lost may have had its effect: a removal may have begun that nobody goes on with."""
        if isinstance(error, StateStoreUnavailable):
            self._in_doubt = True

    async def _listen(self) -> None:
        async with self._state.listen() as announcements:
            async for announcement in announcements:
                if announcement.topic is Topic.SPACE_REQUESTED:
                    self._look.set()
                elif announcement.topic is Topic.SETTINGS_CHANGED:
                    self._operator_state_event.set()
                elif announcement.topic is Topic.PURGE_WANTED:
                    self._purge_now.set()
                elif announcement.topic is Topic.SPACE_FREED:
                    self._note_freed(announcement.object_id)
                elif announcement.topic is Topic.FETCH_CHANGED:
                    self._tools.index.notice(announcement.object_id)

    def _note_freed(self, object_id: str) -> None:
        if object_id and len(self._freed) < _FREED_MOST:
            self._freed.add(ObjectId(object_id))

    async def _take_over(self) -> None:
        await self._tools.index.take_over()
        await self._restore_operator_state()
        self._taken_over.set()

    async def _look_at_volume(self) -> None:
        """VolumeError while there is none. Another one than before: nothing that the store knows is worth anything."""
        volume = self._tools.volume
        await run_blocking(volume.check)
        if volume.replacements != self._replacements:
            self._replacements = volume.replacements
            self._settled = False
            logger.warning("volume_replaced", volume=str(volume.root))
            self._reconcile_now.set()

    async def _make_room(self) -> float:
        await self._look_at_volume()
        if self._in_doubt and time.monotonic() - self._resynced_at > _RESYNC_SECONDS:
            await self._resync()
        await self._tools.removals.complete_all(self._term, _COMPLETED_AT_ONCE)
        usage = await self._state.usage()
        if usage.reconciled:
            device_free = await run_blocking(self._tools.volume.free_bytes)
            await self._tools.eviction.make_room(self._term, usage, device_free)
            self._in_doubt = self._in_doubt or (self._tools.eviction.stuck and self._miscounted(usage) > 0)
        if self._settled and not (usage.reconciled and _is_possible(usage)):
            self._settled = False
            logger.warning("state_store_lost", used=usage.used, objects=usage.objects)
            self._confirm()
            self._reconcile_now.set()
        return self._settings.interval

    async def _resync(self) -> None:
        self._in_doubt = False
        self._resynced_at = time.monotonic()
        await self._tools.index.resync()

    def _miscounted(self, usage: Usage) -> int:
        index = self._tools.index
        return abs(usage.objects - len(index.policy) - len(index.evicting))

    async def _keep_index(self) -> float:
        await self._tools.index.refresh()
        if time.monotonic() - self._saved_at >= SAVE_SECONDS:
            await self._tools.index.save(self._term)
            self._saved_at = time.monotonic()
        return REFRESH_SECONDS

    async def _reconcile(self) -> float:
        await self._restore_operator_state()
        if self._tools.takeover is not None:
            await self._tools.takeover.move_in()
        self._settled = await self._tools.reconciliation.run(self._term)
        if self._settled:
            self._unsettled_runs = 0
            self._repair_now.set()
            return self._settings.reconcile_interval
        self._unsettled_runs += 1
        return min(_LONGEST_UNSETTLED, 2.0 ** min(self._unsettled_runs, 10))

    async def _sweep(self) -> float:
        await asyncio.sleep(min(SWEEP_SECONDS, self._settings.partial_keep))
        await self._tools.partials.sweep(self._term)
        freed, self._freed = self._freed, set()
        await self._tools.reconciliation.look_again(self._term, list(freed))
        usage = await self._state.usage()
        # Announcements get lost; a few objects under way make no difference
        if self._miscounted(usage) > usage.objects // 100:
            self._in_doubt = True
        return 0.0

    async def _repair(self) -> float:
        try:
            if self._settled:
                await self._tools.repair.run(self._term)
                if self._tools.takeover is not None:
                    await self._tools.takeover.finish()
        except CatalogUnavailable as error:
            logger.warning("repair_put_off", reason=str(error))
            return _CATALOG_SECONDS
        return self._settings.reconcile_interval

    async def _copy(self) -> float | None:
        if self._tools.copying is None:
            return None
        return await self._tools.copying.run() if self._settled else REFRESH_SECONDS

    async def _check_duty(self) -> float:
        if not self._settled:
            return REFRESH_SECONDS
        done = await self._tools.duty.run(self._term)
        return self._settings.duty_interval if done else min(_LIST_AGAIN, self._settings.duty_interval)

    async def _restore_operator_state(self) -> None:
        """An emptied store has lost pins and duty too; nothing is evicted before it is reconciled."""
        await self._tools.operator_state.restore()
        self._obey_orders()

    async def _back_up_operator_state(self) -> float:
        try:
            await self._tools.operator_state.save()
        finally:
            self._obey_orders()  # whether or not the copy could be written
        return POLL_INTERVAL

    def _obey_orders(self) -> None:
        self._tools.eviction.pinned = self._tools.operator_state.pinned
        if self._tools.duty.change(self._tools.operator_state.watcher.duty):
            self._duty_now.set()

    async def _purge(self) -> float:
        return await self._tools.purges.step(self._term)

    async def _scrub(self) -> float:
        return await self._tools.scrub.step(self._term)

    async def _last_words(self) -> None:
        """What has been learned since the last save; refused by the store if the term is over."""
        if self._tools.sources is not None:
            self._tools.sources.hide()
        if not self._taken_over.is_set():
            return
        try:
            await self._tools.index.save(self._term)
        except StateStoreUnavailable as error:
            logger.info("index_not_saved", reason=str(error))


def _is_possible(usage: Usage) -> bool:
    """False if the store has lost all entries and kept their sum: there is nothing left to evict by then."""
    return usage.objects > 0 or usage.used == 0
