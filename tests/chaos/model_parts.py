"""Parts of the node of `model.py`: a source that does what it is told, a leader that stops between two calls."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import AsyncGenerator, Callable, Coroutine
from functools import partial
from inspect import iscoroutinefunction
from pathlib import PosixPath
from typing import TYPE_CHECKING, Any, cast

from blake3 import blake3

from distributor_node.services.evictor.adoption import Adoption, PartialReaper
from distributor_node.services.evictor.eviction import Eviction, EvictionRules
from distributor_node.services.evictor.index import EvictionIndex
from distributor_node.services.evictor.node_import import NodeImport
from distributor_node.services.evictor.operator_state import Purger
from distributor_node.services.evictor.reconcile import Reconciliation
from distributor_node.services.evictor.removal import ObjectRemover
from distributor_node.shared.adapters.sources.failover import Chunk, FailoverReader
from distributor_node.shared.adapters.volume.intake import ImportSource
from distributor_node.shared.domain.errors import AllSourcesFailed
from distributor_node.shared.domain.eviction import make_policy
from distributor_node.shared.domain.jobs import RetryPlan
from distributor_node.shared.domain.objects import ContentHash, MediaObject, ObjectId
from distributor_node.shared.domain.space import DeviceSpace, Watermarks
from distributor_node.shared.ports.state_store import StateStore, Term

if TYPE_CHECKING:
    from tests.chaos.model import Node

IDS = ("1", "2", "3", "4")
SIZES = (1000, 2500, 5000, 9000)
LIMIT = 24_000
RETRIES = RetryPlan((0.0, 0.0, 0.0))
DEATHS = ("die_after_begin", "die_in_mid_body", "die_before_publish", "die_before_commit")
PLANS = ("finish", *DEATHS, "stop", "give_up", "wrong_bytes", "sources_fail", "full_at_publication")
SNAPSHOTS = 4
"""Steps that the store may lose at once."""

MAX_SHARE = 1.25
"""Of the server's memory, up to which new work begins."""

STAYING = ("3", "4")
"""Files of the other node whose names cannot be removed."""


def body_of(object_id: str, size: int) -> bytes:
    return (f"{object_id}:{size} " * size)[:size].encode()


def media_object(object_id: ObjectId, size: int) -> MediaObject:
    content_hash = ContentHash("blake3", blake3(body_of(object_id, size)).digest())
    return MediaObject(object_id, size, content_hash, "text/plain", sources=("http://source/1",))


class Killed(BaseException):
    """`kill -9`: nothing that the process would still have done is done. The kernel closes its files."""


class StoreOf:
    """The store as one process sees it: `hook` runs before and after each call."""

    def __init__(self, node: Node, hook: Callable[[str, bool], Coroutine[Any, Any, None]]) -> None:
        self._node, self._hook = node, hook

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._node.state, name)
        if not iscoroutinefunction(found):
            return found

        async def call(*args: Any, **kwargs: Any) -> Any:
            await self._hook(name, False)
            result = await getattr(self._node.state, name)(*args, **kwargs)
            await self._hook(name, True)
            return result

        return call


class ScriptedSource(FailoverReader):
    """Sends a share of the object, and then does what the plan says."""

    def __init__(self) -> None:
        self.plan, self.share = "finish", 1.0

    async def stream(
        self, media_object: MediaObject, first: int, last: int | None, *_: object, **__: object
    ) -> AsyncGenerator[Chunk]:
        body = body_of(media_object.object_id, media_object.size or 0)
        if self.plan == "wrong_bytes":
            body = b"!" * len(body)
        body = body[: None if last is None else last + 1]
        middle = first + int((len(body) - first) * self.share)
        if middle > first:
            yield Chunk("http://source/1", first, body[first:middle])
        await asyncio.sleep(0)
        match self.plan:
            case "die_in_mid_body":
                raise Killed
            case "sources_fail":
                raise AllSourcesFailed({})
            case "stop" | "give_up":
                task = asyncio.current_task()
                assert task is not None
                task.cancel()
                await asyncio.sleep(1)
        if middle < len(body):
            yield Chunk("http://source/1", middle, body[middle:])

    def report_corrupt(self, url: str, object_id: ObjectId | None) -> None: ...


class StayingNames(PosixPath):
    """A directory in which some names cannot be removed, as on a read-only mount."""

    def unlink(self, missing_ok: bool = False) -> None:
        if self.name in STAYING:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        super().unlink(missing_ok)


class Leader:
    """One evictor process. It can be stopped between two steps, as by SIGSTOP, and goes on where it was."""

    def __init__(self, node: Node, holder: str) -> None:
        self.holder, self._node = holder, node
        self.steps_left = -1  # until it stops; -1: it does not
        self.stopped, self._resumed = asyncio.Event(), asyncio.Event()
        self.task: asyncio.Task[None] | None = None
        self.store = cast("StateStore", StoreOf(node, self._step))
        volume = node.volume
        self.index = EvictionIndex(self.store, volume, partial(make_policy, "lru-sp"), lambda: node.now)
        self.remover = ObjectRemover(self.store, volume, self.index)
        self.node_import = NodeImport(self.store, ImportSource(volume.root, node.old_node), None)
        adoption = Adoption(self.store, volume, self.index, self.node_import)
        self.reaper = PartialReaper(self.store, volume, adoption, self.index, keep=3600, space_wait=10)
        self.reconciliation = Reconciliation(
            self.store, volume, self.index, self.remover, adoption, self.reaper
        )
        self.purger = Purger(self.store, volume, self.remover, self.reaper, self.node_import)
        rules = EvictionRules(Watermarks(low=LIMIT // 2, high=LIMIT * 9 // 10), min_idle=0.0)
        clock = partial(getattr, node, "now")
        self.eviction = Eviction(self.store, self.index, self.remover, self.reaper, rules, clock)

    async def _step(self, name: str, after: bool) -> None:
        if name == "adopt_many" and not after:
            await self._node.fetch_in_between()
        if self.steps_left == 0:
            self.stopped.set()
            await self._resumed.wait()
        elif self.steps_left > 0:
            self.steps_left -= 1

    async def run(self, work: Coroutine[Any, Any, None], steps: int) -> bool:
        """Whether it has been stopped, after so many steps."""
        self.steps_left = steps
        self.stopped, self._resumed = asyncio.Event(), asyncio.Event()
        self.task, stopped = asyncio.create_task(work), asyncio.create_task(self.stopped.wait())
        await asyncio.wait({self.task, stopped}, return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        self.steps_left = -1 if self.task.done() else 0
        if self.task.done():
            await self.task
        return not self.task.done()

    async def resume(self) -> None:
        self.steps_left = -1
        self._resumed.set()
        if self.task is not None:
            await self.task

    async def work(self, kind: str, object_id: ObjectId, term: Term) -> None:
        match kind:
            case "evict":
                await self.remover.evict(term, object_id, 0.0, "room")
            case "purge":
                await self.remover.purge(term, object_id, "purged")
            case "settle":
                await self.remover.complete_all(term, 100)
                await self.remover.settle_trash(term)
            case "sweep":
                await self.reaper.sweep(term)
            case "shrink":
                await self.reaper.prepare(term)
            case "evict_partial":
                await self.reaper.evict(term, object_id)
            case "make_room":
                await self.store.request_space(object_id, max(SIZES), 60.0)
                usage = await self.store.usage()
                if usage.reconciled:
                    await self.eviction.run(term, usage, DeviceSpace(free_bytes=10 * LIMIT))
            case _:
                await self.reconciliation.run(term)
