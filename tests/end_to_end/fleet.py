"""Cells of a fleet as processes, with a manifest and a far source in common."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import sys
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from distributor_node.services.demo.objects import DemoObject
from distributor_node.services.demo.storage_node import StorageNode
from distributor_node.shared.domain.peers import Ring
from tests.end_to_end.client import get
from tests.end_to_end.stack import Stack, write_manifest
from tests.servers.redis_server import free_port
from tests.waiting import eventually

KIB = 1024


def report(figure: str) -> None:
    """Show a measured figure (`pytest -s`)."""
    sys.stderr.write(f"{figure}\n")


_ALIVE = re.compile(r"^distributor_peers_alive(?:\{.*\})? (\S+)$", re.MULTILINE)
_SENT = re.compile(r'^distributor_sent_bytes_total\{source="\w+"\} (\S+)$', re.MULTILINE)


async def digest_of(url: str) -> tuple[int, bool, bytes]:
    """Status, whether the body was complete, and its SHA-256, without keeping it. Status 0: no answer."""
    host, _, port = url.removeprefix("http://").partition("/")[0].rpartition(":")
    path = "/" + url.removeprefix("http://").partition("/")[2]
    hasher, received, length, status = hashlib.sha256(), 0, -1, 0
    try:
        reader, writer = await asyncio.open_connection(host, int(port), limit=1 << 20)
    except OSError:
        return 0, False, b""
    try:
        async with asyncio.timeout(300):
            writer.write(f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
            status, length = int(head.split()[1]), int(head.partition("content-length: ")[2].split()[0])
            while received < length and (piece := await reader.read(1 << 20)):
                hasher.update(piece)
                received += len(piece)
    except (OSError, asyncio.IncompleteReadError):
        pass
    finally:
        writer.transport.abort()
    return status, received == length, hasher.digest()


async def _is_known(url: str) -> bool:
    return (await get(url, method="HEAD")).status == 200


@dataclass(slots=True)
class Fleet:
    folder: Path
    servers: tuple[str, str]  # URLs of Redis and RabbitMQ
    far: StorageNode
    cells: list[Stack] = field(default_factory=list)
    digests: dict[str, bytes] = field(default_factory=dict)
    objects: list[DemoObject] = field(default_factory=list)

    def publish(self, objects: Sequence[DemoObject]) -> None:
        self.objects += objects
        for item in objects:
            self.digests[item.object_id] = hashlib.sha256(item.content.read(0, item.size)).digest()
        self.far.objects.update({item.object_id: item for item in objects})
        write_manifest(self.folder / "manifest.json", self.objects, [f"{self.far.api_url}/files/"])

    def new_cell(self, limit: int, **settings: str) -> Stack:
        folder = self.folder / f"cell-{len(self.cells)}"
        folder.mkdir()
        cell = Stack(folder, *self.servers, f"fleet-{uuid.uuid4().hex[:8]}")
        cell.environment |= {
            "DISTRIBUTOR_CATALOG__MANIFEST": str(self.folder / "manifest.json"),
            "DISTRIBUTOR_STORAGE__LIMIT": str(limit),
            "DISTRIBUTOR_EVICTOR__MIN_IDLE": "1",
            "DISTRIBUTOR_LOG__LEVEL": "warning",
            # On a busy machine an answer is late, and not worth a second one: what is counted must not depend on that.
            "DISTRIBUTOR_PUBLIC_API__FIRST_BYTE_WAIT": "30",
            "DISTRIBUTOR_PUBLIC_API__PROXIED_FIRST_BYTE_WAIT": "60",
            **settings,
        }
        self.cells.append(cell)
        return cell

    @property
    def bases(self) -> list[str]:
        return [f"http://127.0.0.1:{cell.port}" for cell in self.cells]

    def join(self, cells: Sequence[Stack], **settings: str) -> None:
        """Tell these cells, which are to be started, of all cells."""
        for cell in cells:
            cell.environment |= {
                "DISTRIBUTOR_PEERS__URLS": json.dumps(self.bases),
                "DISTRIBUTOR_PEERS__OWN_URL": f"http://127.0.0.1:{cell.port}",
                "DISTRIBUTOR_PEERS__FIRST_BYTE_WAIT": "30",
                "DISTRIBUTOR_PEERS__KEEP_BELOW": "0",
                **settings,
            }

    def draw_ports(self, most: float) -> None:
        """Give the cells, which are not started, ports with which no home has more bytes than `most` × the mean.

        Homes follow from ports: chance makes them unequal by several percent where objects are few.
        """
        total = sum(item.size for item in self.objects)
        for _ in range(1000):
            homed: Counter[int] = Counter()
            for item in self.objects:
                homed[self.home(item.object_id)] += item.size
            if max(homed.values()) * len(self.cells) <= most * total:
                return
            for cell in self.cells:
                cell.port = free_port()
                cell.environment["DISTRIBUTOR_PUBLIC_API__PORT"] = str(cell.port)
        raise AssertionError(f"no ports with which each cell has at most {most} × the mean")

    async def up(self, number: int, limit: int = 1 << 30, most: float | None = None, **settings: str) -> None:
        """`most`: see `draw_ports`."""
        cells = [self.new_cell(limit) for _ in range(number)]
        if most is not None:
            self.draw_ports(most)
        if number > 1:
            self.join(cells, **settings)
        await asyncio.gather(*(cell.up() for cell in cells))
        if number > 1:
            # A cell that starts later than the others counts as gone, and its objects are homed elsewhere.
            everyone = range(len(self.cells))
            await eventually(lambda: self.knows_all(everyone), what="all cells see each other")

    def home(self, object_id: str) -> int:
        return self.homes(object_id)[0]

    def homes(self, object_id: str) -> list[int]:
        """The cells in their order for the object."""
        bases = self.bases
        return [bases.index(name) for name in Ring(dict.fromkeys(bases, 1.0)).ranked(object_id)]

    async def knows(self, object_id: str, numbers: Sequence[int]) -> None:
        """Wait until these cells have read a manifest with the object."""
        for number in numbers:
            url = self.cells[number].url(object_id)
            await eventually(lambda url=url: _is_known(url))  # type: ignore[misc]

    async def knows_all(self, numbers: Sequence[int]) -> bool:
        """Whether each of these cells finds all others alive. Its processes probe each by itself."""
        cells = [self.cells[number] for number in numbers]
        processes = [one for cell in cells for kind in ("api", "fetcher") for one in cell.of(kind)]
        pages = [(await get(f"{one.health_url}/metrics")).body.decode() for one in processes]
        return all({float(len(self.cells) - 1)} == set(map(float, _ALIVE.findall(page))) for page in pages)

    async def ask(self, number: int, object_id: str) -> bool:
        """Whether the whole object came. A wrong byte fails the test."""
        status, complete, digest = await digest_of(self.cells[number].url(object_id))
        assert not (status == 200 and complete) or digest == self.digests[object_id], "wrong bytes"
        return status == 200 and complete

    def far_bytes(self, since: int = 0) -> int:
        return sum(record.bytes_sent for record in list(self.far.requests)[since:] if record.method == "GET")

    async def sent(self) -> list[float]:
        """Bytes that each cell has sent, to clients and peers."""
        pages = [await get(f"{cell.of('api')[0].health_url}/metrics") for cell in self.cells]
        return [sum(map(float, _SENT.findall(page.body.decode()))) for page in pages]

    def stored(self, number: int) -> set[str]:
        return {
            path.name for path in self.cells[number].volume.glob("objects/*/*") if path.name in self.digests
        }
