"""Latency of hits while a fault is injected elsewhere."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from distributor_node.services.demo.objects import DemoObject
from tests.end_to_end.client import get

SLICE_SECONDS = 1.0


@dataclass(slots=True)
class Hits:
    """Latencies in seconds, by when they were asked (monotonic); `errors`: what was no right hit."""

    samples: list[tuple[float, float]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    @property
    def p99(self) -> float:
        """The median over slices of a second of each slice's p99: one hiccup of the machine is one slice."""
        slices: dict[int, list[float]] = {}
        for at, seconds in self.samples:
            slices.setdefault(int(at / SLICE_SECONDS), []).append(seconds)
        full = [sorted(values) for values in slices.values() if len(values) >= 20]
        assert full, f"too few hits to tell: {len(self.samples)}"
        return statistics.median(values[int(len(values) * 0.99)] for values in full)


@asynccontextmanager
async def measure_hits(urls: Sequence[str], items: Sequence[DemoObject]) -> AsyncIterator[Hits]:
    """Ask for cached objects one after the other, until the context ends. Each must be a right, whole hit."""
    hits, over = Hits(), asyncio.Event()
    bodies = [item.content.read(0, item.size) for item in items]

    async def ask() -> None:
        number = 0
        while not over.is_set():
            number = (number + 1) % len(urls)
            began = time.monotonic()
            try:
                answer = await get(urls[number], timeout=20)
            except (OSError, TimeoutError) as error:
                hits.errors.append(f"{urls[number]}: {error!r}")
                continue
            hits.samples.append((began, answer.took))
            if (answer.status, answer.headers.get("x-cache")) != (200, "hit") or answer.body != bodies[
                number
            ]:
                hits.errors.append(f"{urls[number]}: {answer.status} {answer.headers.get('x-cache')}")
            await asyncio.sleep(0.004)

    async with asyncio.TaskGroup() as group:
        group.create_task(ask())
        try:
            yield hits
        finally:
            over.set()


def assert_latency_unaffected(calm: Sequence[Hits], disturbed: Hits) -> float:
    """How much longer the slowest hundredth took than undisturbed; AssertionError if more than twice as long."""
    for hits in (*calm, disturbed):
        assert not hits.errors, hits.errors[:5]
    # Below a few milliseconds the scheduler of a busy machine is what is measured
    undisturbed = max(0.005, *(hits.p99 for hits in calm))
    ratio = disturbed.p99 / undisturbed
    assert ratio <= 2, f"p99 {disturbed.p99:.4f} s, undisturbed {[hits.p99 for hits in calm]}"
    return ratio
