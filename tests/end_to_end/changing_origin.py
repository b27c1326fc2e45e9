"""An origin whose objects change at random moments, clients that read them, and what must hold for each answer."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from distributor_node.services.demo.faults import Fault, Match
from distributor_node.services.demo.objects import DemoObject, GeneratedContent, origin_object
from distributor_node.services.demo.storage_node import StorageNode
from tests.end_to_end.client import Answer, exchange
from tests.end_to_end.stack import Stack

SIZES = (60_000, 60_000, 60_000, 200_000)
CONTROLS = ("max-age=0", "max-age=1", "max-age=1, stale-while-revalidate=1", "no-cache", "no-store", None)
FAULTS = (
    Fault(cut_after=30_000),
    Fault(cut_after=30_000, chunked=True, ignore_range=True),
    Fault(chunked=True, ignore_range=True),
    Fault(chunked=True),
    Fault(status=503),
    Fault(latency_before_headers=0.2),
)


@dataclass(frozen=True, slots=True)
class Content:
    """One version of an object."""

    data: bytes
    etag: str  # strong and never used again, weak and always the same, or empty


@dataclass(slots=True)
class ChangingOrigin:
    """Changes objects, and remembers all versions."""

    node: StorageNode
    rng: random.Random
    versions: dict[str, list[Content]] = field(default_factory=dict)

    def change(self, object_id: str) -> None:
        """Replace an object, or bring it into being."""
        self.node.objects[object_id] = self._new_version(object_id)

    def change_while_it_breaks_off(self, object_id: str) -> None:
        """Have the next response cut in the middle, and the object replaced as that response begins."""
        self.node.replacements[object_id] = self._new_version(object_id)
        fault = Fault(cut_after=30_000, replaces_object=True, chunked=self.rng.random() < 0.3)
        self.node.faults.add(fault, Match(object_id=object_id, method="GET", ranged=False, first=1))

    def _new_version(self, object_id: str) -> DemoObject:
        known = self.versions.setdefault(object_id, [])
        number = len(known)
        size = self.rng.choice(SIZES)
        data = GeneratedContent(int(object_id) * 100_000 + number, size).read(0, size)
        etag = self.rng.choice((f'"{object_id}-{number}"', f'"{object_id}-{number}"', 'W/"same"', ""))
        known.append(Content(data, etag))
        modified = self.rng.choice((None, 1_000_000_000 + number))
        control = self.rng.choice(CONTROLS)
        return origin_object(object_id, data, etag, modified, cache_control=control)

    def disturb(self) -> None:
        """Make some of the next responses faulty, or lead elsewhere."""
        self.node.faults.clear()
        for _ in range(self.rng.randrange(3)):
            object_id = self.rng.choice(list(self.versions))
            fault = self.rng.choice(
                (*FAULTS, Fault(redirect_to=f"{self.node.object_url(object_id)}?moved", status=302))
            )
            self.node.faults.add(fault, Match(object_id=object_id, first=self.rng.randrange(1, 4)))

    def problem_of(self, object_id: str, answer: Answer, requested: tuple[int, int] | None) -> str | None:
        """Return what is wrong with an answer. `requested`: first and last byte."""
        if answer.status in (0, 304, 404, 412, 416, 502, 503, 504):
            return None
        etag = answer.headers.get("etag", "")
        versions = [one for one in self.versions[object_id] if one.etag == etag]
        first = 0
        if answer.status == 206 and requested is not None:
            first = requested[0]
        fitting = [one for one in versions if one.data[first : first + len(answer.body)] == answer.body]
        if not fitting:
            return f"{answer.status} {etag}: {len(answer.body)} bytes from {first} are of no version"
        if not answer.complete:
            return None
        ends = {len(one.data) for one in fitting}
        if requested is not None and answer.status == 206:
            ends |= {requested[1] + 1}
        if first + len(answer.body) not in ends:
            return f"{answer.status} {etag}: ends at {first + len(answer.body)}, expected one of {ends}"
        return None


@dataclass(slots=True)
class Reader:
    """One client: it reads whole objects and ranges, resumes with what it has seen, and goes away at times."""

    stack: Stack
    origin: ChangingOrigin
    rng: random.Random
    seen: dict[str, str] = field(default_factory=dict)  # the last strong tag of each object

    async def step(self) -> str | None:
        """Make one request; what is wrong with its answer."""
        object_id = self.rng.choice(list(self.origin.versions))
        self._change_at_times(object_id)
        headers: dict[str, str] = {}
        requested = None
        if self.rng.random() < 0.5:
            first = self.rng.randrange(50_000)
            requested = (first, first + self.rng.randrange(9_000))
            headers["Range"] = f"bytes={requested[0]}-{requested[1]}"
            if object_id in self.seen and self.rng.random() < 0.7:
                headers["If-Range"] = self.seen[object_id]
        elif object_id in self.seen and self.rng.random() < 0.3:
            headers["If-None-Match"] = self.seen[object_id]
        answer = await self._get(object_id, headers)
        if answer is None:
            return None
        etag = answer.headers.get("etag", "")
        if etag.startswith('"'):
            self.seen[object_id] = etag
        problem = self.origin.problem_of(object_id, answer, requested)
        if answer.status == 206 and headers.get("If-Range", etag) != etag:
            problem = f"206 {etag} for If-Range {headers['If-Range']}"
        return None if problem is None else f"{object_id} {headers}: {problem}"

    def _change_at_times(self, object_id: str) -> None:
        chance = self.rng.random()
        if chance < 0.05:
            self.origin.change(object_id)
        elif chance < 0.15:
            self.origin.change_while_it_breaks_off(object_id)

    async def _get(self, object_id: str, headers: dict[str, str]) -> Answer | None:
        lines = [f"GET /api/v1/assets/{object_id} HTTP/1.1", "Host: node"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        request = ("\r\n".join(lines) + "\r\n\r\n").encode()
        patience = 0.05 if self.rng.random() < 0.05 else 40.0
        try:
            async with asyncio.timeout(patience):
                return await exchange("127.0.0.1", self.stack.port, request)
        except (TimeoutError, ConnectionError):
            return None


async def read_changing_objects(
    stack: Stack, node: StorageNode, *, seed: int, steps: int, readers: int = 8, objects: int = 3
) -> Sequence[str]:
    """Make so many requests while the origin changes, disturbs and fetchers are killed; what was wrong."""
    rng = random.Random(seed)
    origin = ChangingOrigin(node, rng)
    for number in range(objects):
        origin.change(str(number + 1))
    problems: list[str] = []
    left = iter(range(steps))

    async def read(reader: Reader) -> None:
        for _ in left:
            problem = await reader.step()
            if problem is not None:
                problems.append(problem)

    async def change() -> None:
        while True:
            await asyncio.sleep(rng.expovariate(3.0))
            origin.change(rng.choice(list(origin.versions)))
            origin.disturb()

    async def kill() -> None:
        while True:
            await asyncio.sleep(rng.uniform(3.0, 8.0))
            fetcher = rng.choice(stack.of("fetcher"))
            fetcher.kill()
            fetcher.start()

    others = [asyncio.create_task(change())]
    if stack.of("fetcher"):
        others.append(asyncio.create_task(kill()))
    try:
        await asyncio.gather(
            *(read(Reader(stack, origin, random.Random(rng.random()))) for _ in range(readers))
        )
    finally:
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        node.faults.clear()
    problems += stored_mixtures(stack, origin)
    return problems


def stored_mixtures(stack: Stack, origin: ChangingOrigin) -> list[str]:
    """Complete files that are no version of their object."""
    found = []
    for object_id, versions in origin.versions.items():
        for path in (stack.volume / "objects").rglob(object_id):
            data = path.read_bytes()
            if all(one.data != data for one in versions):
                found.append(f"stored file of {object_id}: {len(data)} bytes that are of no version")
    return found
