"""`distributor replay` on the node's own log agrees with the node's metrics for the same traffic."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.traces import KINDS, MB, Kind, Parameters, Trace
from distributor_node.services.demo.objects import generated_object
from tests.end_to_end.client import get, read_answer
from tests.end_to_end.conftest import Harness
from tests.end_to_end.stack import Stack

pytestmark = pytest.mark.alone

SECONDS = 24.0
"""Two weeks of the trace take so long here, and the node's own times are shortened likewise."""
VIEWERS = 32
MIN_IDLE = 1.5
"""Longer than the API keeps a file open that was just asked for, which is in use so long."""
RANGE, PAUSE, WATCHED = 120_000, 0.1, 0.6
"""A player asks for so many bytes at a time, with so many seconds in between, for this share of a video."""
WITHIN = 0.01
"""A point."""
WITHIN_BYTES = 0.02
"""One video more or less is half a point of all bytes here."""


def small(kind: Kind) -> Kind:
    """What matters is how the sizes relate to each other, to c0 and to the cache."""
    by = 200 if kind.name == "video" else 25
    most = min(kind.most, 120 * MB)
    share = {"thumbnail": 0.72, "image": 0.16, "video": 0.12}[kind.name]
    return replace(
        kind, share=share, median=kind.median // by, least=kind.least // by, most=most // by,
        views_per_object=kind.views_per_object / 2,
    )  # fmt: skip


PARAMETERS = Parameters(views=2600, kinds=tuple(small(kind) for kind in KINDS), seed=3, holds=2.0)
"""With popularity that moves: an object keeps its place in the order for two of fourteen days."""


@dataclass(frozen=True, slots=True)
class View:
    """`at`: seconds from the start. `ranges`: values of the Range headers to be asked for, "" for none."""

    at: float
    object_id: str
    ranges: Sequence[str]


def schedule(trace: Trace) -> list[View]:
    """In the order of time; large objects by ranges."""
    pace = SECONDS / (trace.times[-1] - trace.times[0])
    views = []
    for request in trace.views():
        ranges = [""]
        if request.size > RANGE:
            ends = range(0, max(1, int(request.size * WATCHED)), RANGE)
            ranges = [f"bytes={first}-{first + RANGE - 1}" for first in ends]
        views.append(View((request.at - trace.times[0]) * pace, str(request.object_id), ranges))
    return views


async def watch(port: int, waiting: deque[View], began: float) -> int:
    """One connection for one view after the other, each at its time; how many requests that were."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    requests = 0
    try:
        while waiting:
            view = waiting.popleft()
            await asyncio.sleep(max(0.0, began + view.at - time.monotonic()))
            for number, wanted in enumerate(view.ranges):
                await asyncio.sleep(PAUSE if number else 0)
                more = f"Range: {wanted}\r\n" if wanted else ""
                writer.write(
                    f"GET /api/v1/assets/{view.object_id} HTTP/1.1\r\nHost: a\r\n{more}\r\n".encode()
                )
                async with asyncio.timeout(60):
                    answer = await read_answer(reader, time.monotonic(), keep_body=False)
                assert (answer.status, answer.complete) == (206 if wanted else 200, True), answer
                requests += 1
    finally:
        writer.transport.abort()
    return requests


@dataclass(frozen=True, slots=True)
class Told:
    """Ratios, by their origin."""

    objects: float
    sources: float
    requests: int
    evicted: int = 0


async def by_metrics(stack: Stack) -> Told:
    """As deploy/prometheus/rules/ratios.yml defines them."""
    requests = [
        (labels["cache"], value)
        for labels, value in await samples(stack, "distributor_requests_total")
        if labels["method"] == "GET"
        and labels["status"] in ("200", "206", "304")
        and labels["cache"] != "none"
    ]
    asked = sum(value for _, value in requests)
    sent = sum(value for _, value in await samples(stack, "distributor_sent_bytes_total"))
    fetched = sum(value for _, value in await samples(stack, "distributor_source_bytes_total"))
    evicted = sum(value for _, value in await samples(stack, "distributor_evictions_total"))
    hits = sum(value for cache, value in requests if cache == "hit")
    return Told(hits / asked, fetched / sent, int(asked), int(evicted))


async def samples(stack: Stack, name: str) -> list[tuple[Mapping[str, str], float]]:
    """Of all processes."""
    found: list[tuple[Mapping[str, str], float]] = []
    for process in stack.processes:
        text = (await get(f"{process.health_url}/metrics")).body.decode()
        for family in text_string_to_metric_families(text):
            found += [(one.labels, one.value) for one in family.samples if one.name == name]
    return found


def by_replay(stack: Stack, limit: int) -> tuple[Told, float, float]:
    """As configured; the hit ratio that the log itself tells; that of LRU in a cache of the same size."""
    (api,) = stack.of("api")
    options = ["--config", str(stack.config), "--size", str(limit), "--policy", "lru"]
    done = subprocess.run(
        [sys.executable, "-m", "distributor_node.services.command_line", "replay", str(api.log), *options],
        env={**os.environ, **stack.environment},
        check=True,
        capture_output=True,
        text=True,
    )
    own = re.search(
        r"^As configured \((.+)\): ([0-9.]+)% of requests.*give ([0-9.]+) bytes", done.stdout, re.MULTILINE
    )
    logged = re.search(r"([0-9.]+)% of requests were hits", done.stdout)
    counted = re.search(r"^([0-9]+) requests for", done.stdout)
    lru = re.search(r"\| lru \| ([0-9.]+) \|", done.stdout)
    assert own is not None, done.stdout
    assert lru is not None, done.stdout
    assert logged is not None, done.stdout
    assert counted is not None, done.stdout
    assert "lower bounds" not in done.stdout, "the log names each object's size"
    told = Told(float(own[2]) / 100, float(own[3]), int(counted[1]))
    return told, float(logged[1]) / 100, float(lru[1])


async def play(harness: Harness, views: Iterable[View]) -> int:
    waiting, began = deque(views), time.monotonic()
    async with asyncio.TaskGroup() as group:
        port = harness.stack.port
        viewers = [group.create_task(watch(port, waiting, began)) for _ in range(VIEWERS)]
    return sum(viewer.result() for viewer in viewers)


async def test_a_replay_of_the_nodes_own_log_agrees_with_its_metrics(harness: Harness) -> None:
    """Two weeks in half a minute: the log has real times, so on both sides a view of five minutes is the whole run, and
    `min_idle` is a second or two."""
    trace = Trace(PARAMETERS)
    sizes = {str(trace.ids[number]): trace.sizes[number] for number in set(trace.objects)}
    harness.publish([generated_object(object_id, size) for object_id, size in sizes.items()])
    harness.stack.config = harness.stack.folder / "node.yaml"
    limit = sum(sizes.values()) * 45 // 100
    settings = {
        "storage": {"limit": limit},
        "evictor": {"min_idle": MIN_IDLE, "interval": 0.1, "cost_per_miss": "auto"},
        "log": {"hits": True},
    }
    harness.stack.config.write_text(yaml.safe_dump(settings))
    del harness.stack.environment["DISTRIBUTOR_STORAGE__LIMIT"]
    await harness.stack.up()
    requests = await play(harness, schedule(trace))
    await asyncio.sleep(0.5)  # the last fetches end
    metrics = await by_metrics(harness.stack)
    replayed, logged, lru = await asyncio.to_thread(by_replay, harness.stack, limit)
    assert metrics.requests == replayed.requests == requests
    assert metrics.evicted > 70
    assert logged == pytest.approx(metrics.objects, abs=0.001)
    assert replayed.objects == pytest.approx(metrics.objects, abs=WITHIN)
    assert replayed.sources == pytest.approx(metrics.sources, abs=WITHIN_BYTES)
    assert abs(lru - metrics.objects) > 2 * WITHIN, "otherwise agreement would mean little"
