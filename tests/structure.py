"""Prints how many modules the node has, how long they are, and how many of them one request runs through.

`python -m tests.structure` starts a standalone node in this process and records, with a profile function in every
thread, the modules whose code runs between a request and the end of its work. `-v` names them. Nothing is asserted.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
import threading
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any
from unittest.mock import patch

from distributor_node.services.demo.manifest import manifest_text
from distributor_node.services.demo.objects import generated_object
from distributor_node.services.demo.storage_node import StorageNode
from distributor_node.services.standalone import main as standalone
from distributor_node.shared.domain.objects import ObjectId
from distributor_node.shared.observability.logging import configure_logging
from distributor_node.shared.ports.state_store import StateStore
from distributor_node.shared.runtime.factories import build_state_store
from distributor_node.shared.runtime.run_service import ServiceScope
from distributor_node.shared.settings.model import Settings
from tests.end_to_end.client import get
from tests.waiting import eventually

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("services", "shared")
SOURCE = "services/demo/"
"""Storage nodes of the demo run in this process too, and are not counted."""

REPETITIONS = 5
OBJECTS = [generated_object(str(number), 1_000_000) for number in range(1, 21)]
LIMIT = 32_000_000
IDLE = 3600.0
"""Seconds between two runs of what a node does by itself: none of it falls into a measurement."""


@dataclass(slots=True)
class Recorder:
    """Modules of the node whose code is called while `recording`."""

    recording: bool = False
    skipped_tasks: tuple[
        str, ...
    ] = ()  # modules that only tasks with these prefixes of their name call are left out
    seen: set[str] = field(default_factory=set)
    _names: dict[str, str | None] = field(default_factory=dict)

    def install(self) -> None:
        """For this thread and those that are started from now on."""
        threading.setprofile(self._profile)
        sys.setprofile(self._profile)

    def _profile(self, frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and self.recording:
            name = self._name(frame.f_code.co_filename)
            if name is not None and not self._is_skipped():
                self.seen.add(name)

    def _is_skipped(self) -> bool:
        try:
            task = asyncio.current_task()
        except RuntimeError:  # a thread without an event loop
            return False
        return task is not None and task.get_name().startswith(self.skipped_tasks)

    def _name(self, file: str) -> str | None:
        if file not in self._names:
            self._names[file] = _module(Path(file))
        return self._names[file]

    async def record(self, work: Callable[[], Awaitable[object]]) -> set[str]:
        """Modules that ran from the start of `work` until it ended."""
        self.seen, self.recording = set(), True
        try:
            await work()
            await asyncio.sleep(0.02)  # what a request leaves to the loop, such as its log record
        finally:
            self.recording = False
        return self.seen


def _module(file: Path) -> str | None:
    path = file.resolve()
    if not path.is_relative_to(ROOT):
        return None
    name = str(path.relative_to(ROOT))
    return name if name.startswith(FOLDERS) and not name.startswith(SOURCE) else None


def print_sizes() -> None:
    """How many modules there are, and how many lines they have."""
    lines = {
        str(file.relative_to(ROOT)): len(file.read_text().splitlines())
        for folder in FOLDERS
        for file in (ROOT / folder).rglob("*.py")
    }
    sizes = {name: count for name, count in lines.items() if count}
    largest = max(sizes, key=sizes.__getitem__)
    print(f"modules              {len(sizes)} (and {len(lines) - len(sizes)} empty files)")
    print(f"median size          {statistics.median(sizes.values()):.0f} lines")
    print(f"largest              {sizes[largest]} lines, {largest}")


@dataclass(slots=True)
class Node:
    """A standalone node with one storage node as its source."""

    port: int
    state: StateStore
    volume: Path
    unread: list[str]

    async def get(self, path: str, expected: tuple[int, str | None]) -> None:
        answer = await get(f"http://127.0.0.1:{self.port}/api/v1/assets/{path}")
        assert (answer.status, answer.headers.get("x-cache")) == expected, answer

    async def fill(self) -> None:
        """Cache all objects."""
        for item in OBJECTS:
            await get(f"http://127.0.0.1:{self.port}/api/v1/assets/{item.object_id}")
        await eventually(lambda: len(self.cached()) == len(OBJECTS))

    def cached(self) -> set[str]:
        return {path.name for path in self.volume.glob("objects/*/*")}

    async def first_hit(self) -> None:
        """Of an object that has not been read since it was stored."""
        await self.get(self.unread.pop(), (200, "hit"))

    async def miss(self) -> None:
        """Of an object that was evicted; from the request until it is stored."""
        object_id = next(item.object_id for item in OBJECTS if item.object_id not in self.cached())
        await self.get(object_id, (200, "miss"))

        async def stored() -> bool:
            return object_id in self.cached() and not await self.state.fetches()

        await eventually(stored)

    async def evict(self) -> None:
        """As a fetcher that needs half of the limit for one object."""
        before = self.cached()
        await self.state.request_space(ObjectId("large"), LIMIT // 2, 60)
        await eventually(lambda: self.cached() < before)


async def started(folder: Path, stack: AsyncExitStack) -> Node:
    """A running node, stopped when `stack` is closed. Its state store is kept, to ask for space and for fetches."""
    source = await stack.enter_async_context(StorageNode(OBJECTS).run())
    manifest = folder / "manifest.yaml"
    manifest.write_text(manifest_text(OBJECTS, source.object_url("")))
    settings = Settings(
        catalog={"kind": "manifest", "manifest": manifest},
        storage={"path": folder / "volume", "limit": LIMIT, "max_cached_item": LIMIT * 5 // 8},
        state_store={"url": "memory://"},
        job_queue={"url": "memory://"},
        sources={"probe_interval": IDLE, "share_interval": IDLE},
        public_api={"host": "127.0.0.1", "port": 0},
        evictor={"interval": IDLE, "min_idle": 1},
        log={"level": "error"},
    )
    states: list[StateStore] = []

    def build_and_keep(settings: Settings) -> StateStore:
        states.append(build_state_store(settings))
        return states[0]

    stack.enter_context(patch.object(standalone, "build_state_store", build_and_keep))
    ports: asyncio.Queue[int] = asyncio.Queue()
    stop = asyncio.Event()
    resources = await stack.enter_async_context(AsyncExitStack())
    running = asyncio.create_task(
        standalone.run_standalone(ServiceScope(stop, resources), settings, ports.put_nowait)
    )

    async def end() -> None:
        stop.set()
        await running

    stack.push_async_callback(end)
    node = Node(await ports.get(), states[0], settings.storage.path, [item.object_id for item in OBJECTS])

    async def reconciled() -> bool:
        return (await node.state.usage()).reconciled

    await eventually(reconciled)
    return node


async def measure(recorder: Recorder, folder: Path) -> dict[str, set[str]]:
    """Names of modules, by what ran through them.

    Everything is repeated, and only modules that ran each time count: a node also works by itself now and then.
    """
    async with AsyncExitStack() as stack:
        node = await started(folder, stack)
        await node.fill()
        await asyncio.sleep(1.5)  # until all objects count as idle, and their files are closed
        works: dict[str, Callable[[], Awaitable[object]]] = {
            "one first hit": node.first_hit,
            "one warm hit": lambda: node.get("1", (200, "hit")),
            "one hit by Sanic": lambda: node.get("1?by=sanic", (200, "hit")),
            "one 404": lambda: node.get("404", (404, None)),
            "one eviction pass": node.evict,
            "one miss": node.miss,
        }
        found: dict[str, set[str]] = {}
        for name, work in works.items():
            for _ in range(REPETITIONS):
                if work == node.evict:
                    await node.fill()
                    await asyncio.sleep(1.5)
                # The evictor notices that an object was stored, and the API which fetches run (`fetch-capacity`,
                # `fetch-events`), as other processes do in a larger deployment.
                recorder.skipped_tasks = ("fetch-",) if work == node.evict else ("evictor",)
                seen = await recorder.record(work)
                found[name] = found.get(name, seen) & seen
        return found


def main() -> None:
    print_sizes()
    configure_logging("error", "json")
    recorder = Recorder()
    recorder.install()
    with tempfile.TemporaryDirectory() as folder:
        found = asyncio.run(measure(recorder, Path(folder)))
    sys.setprofile(None)
    for name, modules in found.items():
        print(f"{name:<20} {len(modules)} modules")
        if "-v" in sys.argv:
            print("".join(f"    {module}\n" for module in sorted(modules)), end="")


if __name__ == "__main__":
    main()
