"""Reports of processes: which of them run, and which were replaced."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

from distributor_node.shared.adapters.state_common import StateTimeouts
from distributor_node.shared.adapters.state_memory import MemoryStateStore
from distributor_node.shared.runtime.process_reports import (
    LATE,
    UNWATCHED_INTERVAL,
    WATCHED_INTERVAL,
    ProcessReporter,
    read_reports,
)
from tests.waiting import eventually


class Clock:
    def __init__(self) -> None:
        self.ahead = 0.0

    def __call__(self) -> float:
        return time.time() + self.ahead


def make_store(clock: Clock) -> MemoryStateStore:
    return MemoryStateStore(1_000_000, StateTimeouts(), clock)


async def write(store: MemoryStateStore, name: str, kind: str = "fetcher", started: float = 0.0) -> None:
    content = {"kind": kind, "host": "h", "process": 7, "started": started, "interval": 1.0}
    await store.report_process(name, json.dumps(content), 600)


async def states(store: MemoryStateStore, clock: Clock) -> dict[str, bool]:
    """By name, whether it is late."""
    return {process.name: process.is_late for process in await read_reports(store, clock)}


async def test_a_process_whose_report_is_due_for_long_does_not_run() -> None:
    clock = Clock()
    store = make_store(clock)
    await write(store, "a")
    clock.ahead += 1.0 + LATE - 0.5
    assert await states(store, clock) == {"a": False}
    clock.ahead += 1.0
    assert await states(store, clock) == {"a": True}


async def test_a_killed_process_is_replaced_by_one_of_its_kind_that_starts_afterwards() -> None:
    clock = Clock()
    store = make_store(clock)
    now = time.time()
    for name in ("killed-1", "killed-2"):
        await write(store, name, started=now - 100)
    clock.ahead = 60.0
    await write(store, "older", started=now - 200)
    await write(store, "evictor", kind="evictor", started=now + 50)
    assert await states(store, clock) == {
        "killed-1": True,
        "killed-2": True,
        "older": False,
        "evictor": False,
    }
    await write(store, "new", started=now + 50)
    found = await states(store, clock)
    assert sorted(found) in (["evictor", "killed-1", "new", "older"], ["evictor", "killed-2", "new", "older"])


async def test_a_process_that_started_shortly_before_the_last_report_replaces_nothing() -> None:
    clock = Clock()
    store = make_store(clock)
    started = time.time()
    clock.ahead = 3.0
    await write(store, "killed", started=started)
    clock.ahead = 60.0
    await write(store, "beside it", started=started + 1)
    assert await states(store, clock) == {"killed": True, "beside it": False}


async def test_a_report_that_cannot_be_read_is_left_out() -> None:
    clock = Clock()
    store = make_store(clock)
    await write(store, "a")
    good: dict[str, Any] = {"kind": "api", "host": "h", "process": 7, "started": 0.0, "interval": 1.0}
    odd: list[dict[str, Any]] = [
        {"removed": 7}, {"viewers": [1]}, {"map": {"sizes": [1], "idle": [1], "cells": []}},
        {"counted": {"fetched": "x"}}, {"started": float("nan")}, {"leads": "perhaps"},
    ]  # fmt: skip
    texts = ["{", "[]", "null", '{"kind": "api"}', *(json.dumps(good | part) for part in odd)]
    for number, text in enumerate(texts):
        await store.report_process(f"b{number}", text, 60)
    assert list(await states(store, clock)) == ["a"]


async def test_what_only_the_page_needs_is_reported_while_one_is_open() -> None:
    store = make_store(Clock())
    asked = 0

    async def part(watched: bool) -> dict[str, Any]:
        nonlocal asked
        asked += 1
        return {"small": asked, **({"part": asked} if watched else {})}

    reporter = ProcessReporter(store, "fetcher", [part])
    running = asyncio.create_task(reporter.run())

    async def reported() -> dict[str, Any]:
        return json.loads(found[0].content) if (found := await store.process_reports()) else {}

    async def has_part() -> bool:
        return "part" in await reported()

    await eventually(reported)
    assert (asked, (await reported())["interval"]) == (1, UNWATCHED_INTERVAL)
    assert (await reported()).keys() >= {"small", "counted"}
    assert "part" not in await reported()
    await store.watch_reports(60)
    reporter.wake()
    await eventually(has_part)
    assert (await reported())["interval"] == WATCHED_INTERVAL
    running.cancel()
    await asyncio.wait({running})
    assert await store.process_reports() == [], "a process that ends in good order withdraws its report"
