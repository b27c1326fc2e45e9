"""What the demo page shows and does with one film: viewers beside downloads from storage nodes, and what may go wrong.

Two storage nodes hold the film and share their faults, so that a fault meets the download of the node, whichever of the
two it has chosen. They send it at PACE, so that there is something to watch.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import structlog

from distributor_node.services.demo.delivery import RequestRecord
from distributor_node.services.demo.faults import Fault, FaultRegistry, Match
from distributor_node.services.demo.manifest import content_hash
from distributor_node.services.demo.objects import MIB, DemoObject
from distributor_node.services.demo.storage_node import StorageNode
from distributor_node.services.standalone.main import RunningNode
from distributor_node.shared.domain.objects import ContentHash, ObjectId
from distributor_node.shared.ports.state_store import Fetch, FetchPhase

PACE = 8 * MIB
"""Bytes a second that each storage node sends of the film."""

SLOW_PACE = MIB
CUT_AFTER, CORRUPT_AT = 12 * MIB, 20 * MIB
LEAVES_AFTER = 8 * MIB
MANY, FEW = 20, 5
"""Viewers of a scene."""

CORRUPT_MEMORY = 600.0
"""Seconds for which the node does not ask a storage node again for an object of which it had wrong bytes."""

_KILL_AFTER, _FETCHER_PAUSE = 1.5, 1.0  # less than public_api.stalled_fetch_wait: nothing is bridged
_FORGET_SECONDS, _PAUSE_SECONDS = 30.0, 60.0
_RETRY_SECONDS = 0.5
_MAX_CUTS = 10

logger = structlog.get_logger()


@dataclass(slots=True)
class Viewer:
    """A client that loads the film from its beginning to its end, and again if the answer was cut."""

    position: int = 0  # bytes received of the current answer
    received: int = 0  # bytes of all answers
    cache: str = ""  # hit, pending or miss: of the latest answer
    cuts: int = 0
    state: str = "running"  # or done, left, wrong (complete, with wrong bytes), failed

    def as_json(self) -> dict[str, Any]:
        """Return what the page shows."""
        return {"position": self.position, "cache": self.cache, "cuts": self.cuts, "state": self.state}


@dataclass(slots=True)
class Story:
    """The film, its storage nodes and the node, for the time that the demo runs."""

    film: DemoObject
    sources: Sequence[StorageNode]
    others: Sequence[DemoObject]  # that fill the cache
    node_url: str
    node: RunningNode | None = None  # None: it has not started yet
    viewers: list[Viewer] = field(default_factory=list)
    scene: str = ""
    number: int = 0  # of the scene; rises with every one
    note: str = ""  # how far the scene is
    corrupted_at: float | None = None
    fetcher_stopped: bool = False
    filled: int = 0  # bytes loaded of the other objects
    _task: asyncio.Task[None] | None = None
    _hash: ContentHash = field(init=False)

    def __post_init__(self) -> None:
        self._hash = ContentHash.parse(content_hash(self.film.content))

    # What the page shows

    def document(self) -> dict[str, Any]:
        """Return the document `/story.json`."""
        wait = 0.0
        if self.corrupted_at is not None:
            wait = max(0.0, self.corrupted_at + CORRUPT_MEMORY - time.monotonic())
        return {
            "film": {"id": self.film.object_id, "size": self.film.size, "name": self.film.name},
            "scene": self.scene,
            "number": self.number,
            "note": self.note,
            "running": self._task is not None and not self._task.done(),
            "fetcher": "stopped" if self.fetcher_stopped else "running",
            "corrupt_again_in": round(wait),
            "received": sum(viewer.received for viewer in self.viewers),
            "viewers": [viewer.as_json() for viewer in self.viewers],
            "filled": self.filled,
            "sources": [
                {
                    "name": f"storage node {letter}",
                    "downloads": [
                        _download(record, self.film.size)
                        for record in source.requests.of(self.film.object_id, "GET")
                    ],
                }
                for letter, source in zip("ABCDEFGH", self.sources, strict=False)
            ],
        }

    # What its buttons do

    @property
    def scenes(self) -> dict[str, Callable[[], Awaitable[None]]]:
        """The scenes by name."""
        return {
            "viewers": self._many_viewers,
            "throttle": self._throttle,
            "cut": self._cut,
            "corrupt": self._corrupt,
            "kill": self._kill,
            "leave": self._leave,
            "forget": self._only_forget,
            "fill": self._fill,
        }

    def begin(self, scene: str) -> bool:
        """Begin a scene; the one before ends. False: there is no such scene, or the node has not started."""
        work = self.scenes.get(scene)
        if work is None or self.node is None:
            return False
        before = self._task
        self.scene, self.number, self.note = scene, self.number + 1, ""
        self._task = asyncio.create_task(self._play(work, before), name=f"scene-{scene}")
        return True

    async def close(self) -> None:
        """End the scene."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    async def _play(self, work: Callable[[], Awaitable[None]], before: asyncio.Task[None] | None) -> None:
        if before is not None and not before.done():
            before.cancel()
            await asyncio.wait({before})
        self.viewers, self.filled = [], 0
        for source in self.sources:
            source.requests.clear()
        self.set_paces()
        try:
            await work()
            self.note = "over"
        except (TimeoutError, httpx.HTTPError) as error:
            logger.warning("scene_failed", scene=self.scene, reason=repr(error))
            self.note = f"failed: {type(error).__name__}"

    def set_paces(self, *first: Fault, pace: int = PACE) -> None:
        """Have the film sent at this pace. `first`: the fault of the next answer with the whole film."""
        film, faults = self.film.object_id, FaultRegistry()
        for fault in first:
            faults.add(fault, Match(object_id=film, method="GET", ranged=False, first=1))
        faults.add(Fault(bytes_per_second=pace), Match(object_id=film, method="GET"))
        for source in self.sources:
            source.faults = faults

    async def _many_viewers(self) -> None:
        await self._watch(MANY)

    async def _throttle(self) -> None:
        await self._forget()
        self.set_paces(pace=SLOW_PACE)
        await self._watch(FEW)

    async def _cut(self) -> None:
        await self._forget()
        self.set_paces(Fault(bytes_per_second=PACE, cut_after=CUT_AFTER))
        await self._watch(FEW)

    async def _corrupt(self) -> None:
        await self._forget()
        self.set_paces(Fault(bytes_per_second=PACE, flip_byte_at=CORRUPT_AT))
        self.corrupted_at = time.monotonic()
        await self._watch(FEW)

    async def _kill(self) -> None:
        if self.node is None:
            return
        await self._forget()
        watching = asyncio.create_task(self._watch(FEW))
        try:
            await asyncio.sleep(_KILL_AFTER)
            self.fetcher_stopped = True
            await self.node.fetcher.replace(_FETCHER_PAUSE)
            self.fetcher_stopped = False
            await watching
        finally:
            self.fetcher_stopped = False
            watching.cancel()
            await asyncio.wait({watching})

    async def _only_forget(self) -> None:
        await self._forget()

    async def _leave(self) -> None:
        """One viewer leaves early. The film is fetched a window ahead of it, and stays as a partial object."""
        if self.node is None:
            return
        state, film = self.node.state, ObjectId.parse(self.film.object_id)
        await self._forget()
        # With another object there is no ample room, in which the rest of the film would be fetched all the same.
        await self._fill(self.others[:1])
        self.viewers = [Viewer()]
        async with self._client() as client:
            await self._view(self.viewers[0], client, LEAVES_AFTER)
        async with asyncio.timeout(_PAUSE_SECONDS):
            while not _has_ended((await state.find(film)).fetch):  # noqa: ASYNC110 - the page polls as well
                await asyncio.sleep(0.1)

    async def _fill(self, items: Sequence[DemoObject] | None = None) -> None:
        async with self._client() as client:
            for item in self.others if items is None else items:
                async with client.stream("GET", self._url(item)) as answer:
                    async for data in answer.aiter_raw():
                        self.filled += len(data)

    async def _watch(self, count: int) -> None:
        self.viewers = [Viewer() for _ in range(count)]
        async with self._client() as client, asyncio.TaskGroup() as group:
            for viewer in self.viewers:
                group.create_task(self._view(viewer, client))

    async def _view(
        self, viewer: Viewer, client: httpx.AsyncClient, leaves_after: float = float("inf")
    ) -> None:
        """`leaves_after`: bytes."""
        while viewer.cuts < _MAX_CUTS:
            hasher, viewer.position = self._hash.hasher(), 0
            try:
                async with client.stream("GET", self._url(self.film)) as answer:
                    viewer.cache = answer.headers.get("X-Cache", str(answer.status_code))
                    answer.raise_for_status()
                    async for data in answer.aiter_raw():
                        viewer.position += len(data)
                        viewer.received += len(data)
                        hasher.update(data)
                        if viewer.position >= leaves_after:
                            viewer.state = "left"
                            return
                viewer.state = "done" if hasher.digest() == self._hash.digest else "wrong"
                return
            except httpx.HTTPError:
                viewer.cuts += 1
                await asyncio.sleep(_RETRY_SECONDS)
        viewer.state = "failed"

    async def _forget(self) -> None:
        """Have the node drop the film. A fetch that has begun is let finish first, unhindered."""
        if self.node is None:
            return
        for source in self.sources:
            source.faults = FaultRegistry()
        self.note = "the node forgets the film"
        asked = False
        async with self._client() as client, asyncio.timeout(_FORGET_SECONDS):
            while (cache := await self._cache_state(client)) != "miss":
                if cache == "pending" and not asked:
                    # Responses under way keep their faults: the node asks again, and goes on at the same byte.
                    for source in self.sources:
                        await source.drop_connections()
                    await self._view(Viewer(), client)  # it may wait for a viewer
                    asked = True
                elif cache == "hit":
                    await self.node.state.request_purges([ObjectId.parse(self.film.object_id)])
                await asyncio.sleep(0.1)
        for source in self.sources:
            source.requests.clear()
        self.note = ""
        self.set_paces()

    async def _cache_state(self, client: httpx.AsyncClient) -> str:
        answer = await client.head(self._url(self.film))
        return str(answer.headers.get("X-Cache", ""))

    def _url(self, item: DemoObject) -> str:
        return f"{self.node_url}/api/v1/assets/{item.object_id}"

    @staticmethod
    def _client() -> httpx.AsyncClient:
        limits = httpx.Limits(max_connections=MANY + 1, max_keepalive_connections=0)
        return httpx.AsyncClient(timeout=60.0, limits=limits, trust_env=False)


def _has_ended(fetch: Fetch | None) -> bool:
    return fetch is None or fetch.phase is FetchPhase.PARKED


def _download(record: RequestRecord, size: int) -> dict[str, Any]:
    """Return one request to a storage node: from which byte, how many bytes, and how it ended."""
    first = 0
    if record.range is not None:
        begin = record.range.removeprefix("bytes=").partition("-")[0]
        first = int(begin) if begin.isdigit() else size
    state = "sending" if not record.finished else "cut" if record.aborted else "sent"
    return {"first": first, "sent": record.bytes_sent, "state": state, "status": record.status}
