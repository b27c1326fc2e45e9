"""Checks that hold once the node has nothing left to do."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Mapping, Sequence

from distributor_node.services.demo.objects import DemoObject
from distributor_node.shared.domain.space import RECORD_BYTES, footprint
from tests.chaos.harness import ChaosHarness
from tests.chaos.watchers import VolumeScan, process_tree, scan_volume

SETTLE_TIMEOUT = 90.0
INSPECTION_TIMEOUT = 60.0


async def wait_until_settled(
    chaos: ChaosHarness, objects: Sequence[DemoObject], *, timeout: float = SETTLE_TIMEOUT
) -> float:
    """Wait until the node is at rest, then look at everything; seconds that took. AssertionError says what is wrong."""
    began = time.monotonic()
    while True:
        problem = await _pending_work(chaos)
        if problem is None:
            break
        assert time.monotonic() - began < timeout, f"not at rest after {timeout} s: {problem}"
        await asyncio.sleep(0.2)
    took = time.monotonic() - began
    known = {item.object_id: item for item in objects}
    check_volume(chaos, known)
    check_logs(chaos)
    return took


async def inspect(chaos: ChaosHarness, *, timeout: float = INSPECTION_TIMEOUT) -> None:
    """At the end of every chaos test: index and sums are what a scan of the volume finds, and what is on it is right.

    AssertionError says what is wrong. Jobs may be left, as long as what they have reserved counts.
    """
    began = time.monotonic()
    while (problem := await accounting_problem(chaos)) is not None:
        assert time.monotonic() - began < timeout, f"the accounts are wrong for {timeout} s: {problem}"
        await asyncio.sleep(0.2)
    published = {**chaos.first.objects, **chaos.second.objects}
    check_volume(chaos, published, others=True)


async def accounting_problem(chaos: ChaosHarness) -> str | None:
    """How the state store differs from the volume; None if it does not. While something moves they may differ."""
    volume = chaos.stack.volume
    processes = [process.process.pid for process in chaos.stack.processes if process.process]
    pids = [os.getpid(), *(pid for parent in processes for pid in process_tree(parent))]
    async with chaos.state() as state:
        before, fetches = await state.usage(), await state.fetches()
        indexed = {str(entry.object_id): entry.size async for batch in state.entries() for entry in batch}
        scanned = await asyncio.to_thread(scan_volume, volume, pids) if volume.is_dir() else VolumeScan()
        usage = await state.usage()
    if (before, before.churn) != (usage, usage.churn):
        return f"bytes move: {before}, {usage}"
    if not usage.reconciled and volume.is_dir():
        return "the index does not stand for the volume"
    if indexed != scanned.objects:
        return f"index and disk differ: {set(indexed.items()) ^ set(scanned.objects.items())}"
    reserved = {str(fetch.object_id): fetch.reserved - RECORD_BYTES for fetch in fetches if fetch.reserved}
    if any(size > reserved.get(object_id, -1) for object_id, size in scanned.partials.items()):
        return f"partial files {scanned.partials}, reserved {reserved}"
    if scanned.bytes > usage.used + usage.reserved:
        return f"used {usage.used}, reserved {usage.reserved}, on the volume {scanned}"
    promised = sum(map(footprint, (*scanned.objects.values(), *reserved.values())))
    if usage.used + usage.reserved != promised + sum(scanned.leaving.values()):
        return f"{usage}, {promised} in objects and fetches, leaving {scanned.leaving}"
    if usage.used + usage.reserved > chaos.limit > 0:
        return f"used {usage.used}, reserved {usage.reserved} of {chaos.limit}"
    return None


async def _pending_work(chaos: ChaosHarness) -> str | None:
    queues = await chaos.queue_lengths()
    if any(queues.values()):
        return f"jobs left: {queues}"
    if (problem := await accounting_problem(chaos)) is not None:
        return problem
    async with chaos.state() as state:
        usage, fetches = await state.usage(), await state.fetches()
    incoming = left_in_incoming(chaos)
    leaving = [path.name for path in (chaos.stack.volume / "leaving").iterdir()]
    if fetches or usage.reserved or incoming or leaving:
        return f"fetches {fetches}, reserved {usage.reserved}, incoming {incoming}, leaving {leaving}"
    return None


def left_in_incoming(chaos: ChaosHarness) -> list[str]:
    """Files in `incoming/`; but not, if a process was killed, records without a partial file.

    A worker is killed between the renaming of its file and the removal of its record, or while it writes one. Such a
    record takes nothing that is counted, and reconciliation removes it once it is ten minutes old.
    """
    names = {path.name for path in (chaos.stack.volume / "incoming").iterdir()}
    if any(process.was_killed for process in chaos.stack.processes):
        names -= {name for name in names if name.endswith(",new")}
        names -= {
            name for name in names if name.endswith(".json") and f"{name[: -len('.json')]}.part" not in names
        }
    return sorted(names)


def check_volume(chaos: ChaosHarness, known: Mapping[str, DemoObject], *, others: bool = False) -> None:
    """Every object on the volume is complete and right. `others`: files that are not `known` may be there, too."""
    for path in chaos.stack.volume.glob("objects/*/*"):
        if others and path.name not in known:
            continue
        item = known[path.name]
        assert path.read_bytes() == item.content.read(0, item.size), f"{path.name} is not what it should be"


def check_logs(chaos: ChaosHarness) -> None:
    """No process has met anything it did not expect."""
    for process in chaos.stack.processes:
        text = process.log.read_text(errors="replace")
        for sign in (
            "Traceback",
            "unhandled_loop_error",
            "never retrieved",
            "was destroyed but it is pending",
        ):
            place = text.find(sign)
            assert place < 0, f"{process.name}: {text[max(0, place - 1500) : place + 2500]}"
