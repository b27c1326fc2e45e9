"""Standalone nodes in one process that act as one cache, and peers that are scripted storage nodes."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from distributor_node.services.demo.objects import DemoObject, generated_object
from distributor_node.services.demo.storage_node import StorageNode
from distributor_node.services.standalone.main import run_standalone
from distributor_node.shared.domain.peers import Ring
from distributor_node.shared.runtime.run_service import ServiceScope
from distributor_node.shared.settings.model import Settings
from tests.end_to_end.client import Answer, get
from tests.end_to_end.stack import write_manifest
from tests.servers.operator_token import SECRET
from tests.servers.redis_server import free_port

PATIENT = 5.0
"""Seconds to wait for a peer's first byte: the machine of the tests may be busy."""


@dataclass(slots=True)
class Fleet:
    """Nodes that share a manifest and one far source."""

    folder: Path
    far: StorageNode
    stack: AsyncExitStack
    bases: list[str]
    objects: list[DemoObject] = field(default_factory=list)
    stops: dict[str, Any] = field(default_factory=dict)
    operators: dict[str, int] = field(default_factory=dict)  # ports of the operator APIs
    waits: dict[str, dict[str, Any]] = field(default_factory=dict)  # settings of other groups than `peers`

    def publish(self, *objects: DemoObject) -> None:
        self.far.objects.update({item.object_id: item for item in objects})
        self.objects += objects
        write_manifest(self.folder / "manifest.json", self.objects, [f"{self.far.api_url}/files/"])

    async def start(
        self,
        base: str,
        members: Sequence[str] | None = None,
        port: int | None = None,
        peer_port: int | None = None,
        **peers: Any,
    ) -> None:
        """`port`: where the node listens, if not at its base URL. `peer_port`: and where peers ask."""
        port = port or int(base.rpartition(":")[2])
        operator = self.operators.setdefault(base, free_port())
        values: dict[str, Any] = {
            "urls": members or self.bases,
            "own_url": base,
            "first_byte_wait": PATIENT,
            "keep_below": 0,
        }
        if peer_port is not None:
            values |= {"port": peer_port, "host": "127.0.0.1"}
        settings = Settings(
            catalog={"kind": "manifest", "manifest": self.folder / "manifest.json"},
            storage={"path": self.folder / f"volume-{port}", "limit": "1G"},
            public_api={"host": "127.0.0.1", "port": port, **self.waits.get("public_api", {})},
            fetch=self.waits.get("fetch", {}),
            metrics={"host": "127.0.0.1", "port": 0},
            dashboard=self.waits.get("dashboard", {"enabled": False}),
            operator_api={"port": operator, "secret": SECRET},
            peers=values | peers,
            shutdown_deadline=2,
            log={"level": "error"},
        )
        stop, listening = asyncio.Event(), asyncio.Event()
        resources = await self.stack.enter_async_context(AsyncExitStack())

        async def serve() -> None:
            async with resources:
                await run_standalone(ServiceScope(stop, resources), settings, lambda _: listening.set())

        task = asyncio.create_task(serve())

        async def end() -> None:
            stop.set()
            await task

        self.stops[base] = end
        waiting = asyncio.create_task(listening.wait())
        await asyncio.wait({task, waiting}, return_when=asyncio.FIRST_COMPLETED)
        assert listening.is_set(), task.exception()

    async def stop(self, base: str) -> None:
        if base in self.stops:
            await self.stops.pop(base)()

    def in_order(self, object_id: str) -> Sequence[str]:
        """The nodes, its home first."""
        return Ring(dict.fromkeys(self.bases, 1.0)).ranked(object_id)

    def homed_at(self, base: str, size: int, ids: Iterable[int] = range(1, 1000)) -> DemoObject:
        """An object whose home this node is."""
        return next(
            generated_object(str(number), size) for number in ids if self.in_order(str(number))[0] == base
        )

    async def get(self, base: str, object_id: str, **headers: str) -> Answer:
        return await get(f"{base}/api/v1/assets/{object_id}", headers)

    async def hop(self, base: str, object_id: str, **headers: str) -> tuple[int, bytes]:
        """Ask as a peer does, by a client that takes interim responses. Returns status and body."""
        async with httpx.AsyncClient() as client:
            answer = await client.get(
                f"{base}/api/v1/assets/{object_id}", headers={"X-Distributor-Hop": "1", **headers}
            )
            return answer.status_code, answer.content

    def stored(self, base: str, object_id: str) -> bool:
        volume = self.folder / f"volume-{base.rpartition(':')[2]}"
        return any(volume.glob(f"objects/*/{object_id}"))

    def far_gets(self, object_id: str) -> int:
        return len(self.far.requests.of(object_id, "GET"))


@asynccontextmanager
async def fleet_of(count: int, folder: Path) -> AsyncIterator[Fleet]:
    """So many nodes, not started, and a far source."""
    async with AsyncExitStack() as stack:
        far = await stack.enter_async_context(StorageNode([]).run())
        made = Fleet(folder, far, stack, [f"http://127.0.0.1:{free_port()}" for _ in range(count)])
        made.publish()
        try:
            yield made
        finally:
            for base in list(made.stops):
                await made.stop(base)


async def start_all(fleet: Fleet, **peers: Any) -> None:
    for base in fleet.bases:
        await fleet.start(base, **peers)


def is_whole(answer: Answer, item: DemoObject) -> bool:
    expected = hashlib.sha256(item.content.read(0, item.size)).digest()
    right = hashlib.sha256(answer.body).digest() == expected
    return answer.status == 200 and answer.complete and right


@asynccontextmanager
async def as_peer(node: StorageNode) -> AsyncIterator[str]:
    """The base URL of a server that has what the storage node has, with its faults, under the paths of a peer."""

    async def pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while piece := await reader.read(1 << 16):
                writer.write(piece.replace(b" /api/v1/assets/", b" /api/v1/files/", 1))
                await writer.drain()
        writer.close()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", node.port)
        with suppress(asyncio.CancelledError):
            await asyncio.gather(pipe(reader, back), pipe(there, writer))

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
