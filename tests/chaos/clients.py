"""A pool of clients that requests objects in every way and checks each response byte by byte."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field

from distributor_node.services.demo.objects import DemoObject
from tests.end_to_end.client import Answer, get

REQUEST_SECONDS = 60.0
_KINDS = ("whole", "range", "tail", "suffix", "head", "conditional", "leave")
_WEIGHTS = (40, 20, 10, 5, 10, 5, 10)


@dataclass(frozen=True, slots=True)
class Failure:
    """An answer that was cut, refused or an error. Times are monotonic."""

    began: float
    ended: float
    description: str


@dataclass(frozen=True, slots=True)
class Latency:
    """Seconds to the whole answer of a small request, and the cache result."""

    at: float
    seconds: float
    result: str


@dataclass(slots=True)
class ClientPool:
    """`wrong` is never allowed to hold anything; `failures` only while a fault is active (see `fault`)."""

    url_of: Callable[[str], str]
    objects: Sequence[DemoObject]
    seed: int = 0
    sources_lie: bool = False
    """Then an inner range of an object that is not verified yet may hold wrong bytes, and so may what was cut."""
    requested: Counter[str] = field(default_factory=Counter)
    results: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    latencies: list[Latency] = field(default_factory=list)
    pause: float = 0.0
    _faults: list[list[float]] = field(default_factory=list)
    _etags: dict[str, str] = field(default_factory=dict)
    _bodies: dict[str, bytes] = field(default_factory=dict)

    @asynccontextmanager
    async def running(self, clients: int = 6) -> AsyncIterator[None]:
        """Ask until the context ends; requests under way are then waited for."""
        over = asyncio.Event()
        rngs = [random.Random(f"{self.seed}-{number}") for number in range(clients)]
        async with asyncio.TaskGroup() as group:
            for rng in rngs:
                group.create_task(self._work(rng, over))
            try:
                yield
            finally:
                over.set()

    @contextmanager
    def fault(self, grace: float = 0.0) -> Iterator[None]:
        """Answers under way at some time between now and `grace` seconds after the context may fail."""
        window = [time.monotonic(), float("inf")]
        self._faults.append(window)
        try:
            yield
        finally:
            window[1] = time.monotonic() + grace

    def check(self) -> None:
        """Nothing was wrong, and nothing failed without a fault to blame."""
        assert not self.wrong, self.wrong[:10]
        unexplained = [failure for failure in self.failures if not self._is_expected(failure)]
        assert not unexplained, (len(unexplained), unexplained[:10])

    def summary(self) -> str:
        return (
            f"{self.requested.total()} requests tried, {len(self.failures)} failed while a fault was active,"
            f" {len(self.wrong)} wrong; {dict(self.results)}"
        )

    def _is_expected(self, failure: Failure) -> bool:
        return any(began <= failure.ended and failure.began <= ended for began, ended in self._faults)

    async def _work(self, rng: random.Random, over: asyncio.Event) -> None:
        while not over.is_set():
            await self.ask(rng)
            if self.pause:
                await asyncio.sleep(self.pause)

    async def ask(self, rng: random.Random) -> None:
        """One request of a random kind for a random object (some are more popular than others)."""
        item = self.objects[min(int(rng.expovariate(3.0 / len(self.objects))), len(self.objects) - 1)]
        (kind,) = rng.choices(_KINDS, _WEIGHTS)
        self.requested[kind] += 1
        began = time.monotonic()
        try:
            await self._ask(rng, item, kind, began)
        except TimeoutError:
            self.wrong.append(f"{kind} {item.object_id}: no end within {REQUEST_SECONDS} s")
        except OSError as error:
            self._record_failure(began, f"{kind} {item.object_id}: {error!r}")
            await asyncio.sleep(0.1)

    async def _ask(self, rng: random.Random, item: DemoObject, kind: str, began: float) -> None:
        url, size = self.url_of(item.object_id), item.size
        first = rng.randrange(size)
        match kind:
            case "leave":
                await self._disconnect(url, rng.randrange(1, 200_000))
            case "head":
                self._check_response(
                    item, kind, await get(url, method="HEAD", timeout=REQUEST_SECONDS), None, began
                )
            case "conditional":
                etag = self._etags.get(item.object_id, '"none"')
                answer = await get(url, {"If-None-Match": etag}, timeout=REQUEST_SECONDS)
                span = (0, size) if answer.status != 304 else None
                self._check_response(item, kind, answer, span, began)
            case "whole":
                self._check_response(item, kind, await get(url, timeout=REQUEST_SECONDS), (0, size), began)
            case _:
                last = min(size - 1, first + rng.randrange(300_000))
                text = {"range": f"{first}-{last}", "tail": f"{first}-", "suffix": f"-{size - first}"}[kind]
                answer = await get(url, {"Range": f"bytes={text}"}, timeout=REQUEST_SECONDS)
                end = last + 1 if kind == "range" else size
                self._check_response(item, kind, answer, (first, end), began)

    async def _disconnect(self, url: str, after: int) -> None:
        """Read so many bytes of the body, or all of it if it is shorter, then go without a word."""
        address, _, path = url.removeprefix("http://").partition("/")
        host, _, port = address.partition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        try:
            writer.write(f"GET /{path} HTTP/1.1\r\nHost: node\r\n\r\n".encode())
            async with asyncio.timeout(REQUEST_SECONDS):
                head = await reader.readuntil(b"\r\n\r\n")
                _, _, length = head.lower().partition(b"\r\ncontent-length: ")
                after = min(after, int(length.split(b"\r\n")[0] or 0))
                while after > 0 and (piece := await reader.read(min(65536, after))):
                    after -= len(piece)
        except asyncio.IncompleteReadError as error:
            raise ConnectionResetError("cut within the head") from error
        finally:
            writer.transport.abort()

    def _check_response(
        self, item: DemoObject, kind: str, answer: Answer, span: tuple[int, int] | None, began: float
    ) -> None:
        description = f"{kind} {item.object_id}: {answer.status} {answer.headers.get('x-cache')}"
        result = answer.headers.get("x-cache", "none")
        self.results[f"{answer.status} {result}"] += 1
        expected = (304,) if span is None and kind != "head" else (200,) if kind != "range" else (206,)
        if kind in ("tail", "suffix"):
            expected = (206,)
        if answer.status not in expected:
            self._record_failure(began, f"{description} {answer.body[:200]!r}")
            return
        etag = self._etags.setdefault(item.object_id, answer.headers.get("etag", ""))
        if answer.headers.get("etag") != etag:
            self.wrong.append(f"{description}: entity tag {answer.headers.get('etag')}, it was {etag}")
        self._check_body(item, description, answer, span, began)
        if answer.complete and len(answer.body) < 500_000:
            self.latencies.append(Latency(began, answer.took, result))

    def _check_body(
        self, item: DemoObject, description: str, answer: Answer, span: tuple[int, int] | None, began: float
    ) -> None:
        first, end = span or (0, 0)
        if span is not None and int(answer.headers["content-length"]) != end - first:
            self.wrong.append(
                f"{description}: Content-Length {answer.headers['content-length']}, not {end - first}"
            )
        right = memoryview(self._body(item))[first:end]
        must_be_right = not self.sources_lie or (answer.complete and end == item.size)
        if must_be_right and right[: len(answer.body)] != answer.body:
            self.wrong.append(f"{description} {span}: wrong bytes, complete={answer.complete}")
        if not answer.complete:
            self._record_failure(began, f"{description}: cut after {len(answer.body)} of {end - first}")

    def _record_failure(self, began: float, description: str) -> None:
        self.failures.append(Failure(began, time.monotonic(), description))

    def _body(self, item: DemoObject) -> bytes:
        known = self._bodies.get(item.object_id)
        if known is None:
            known = self._bodies[item.object_id] = item.content.read(0, item.size)
        return known
