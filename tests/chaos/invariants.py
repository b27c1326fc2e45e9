"""Checks that hold once the node has nothing left to do."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence

from distributor_node.services.demo.objects import DemoObject
from distributor_node.shared.domain.space import footprint
from tests.chaos.harness import ChaosHarness

SETTLE_TIMEOUT = 90.0


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


async def _pending_work(chaos: ChaosHarness) -> str | None:
    async with chaos.state() as state:
        usage, fetches = await state.usage(), await state.fetches()
        indexed = {entry.object_id: entry.size async for batch in state.entries() for entry in batch}
    on_disk = {path.name: path.stat().st_size for path in chaos.stack.volume.glob("objects/*/*")}
    incoming = [path.name for path in (chaos.stack.volume / "incoming").iterdir()]
    leaving = [path.name for path in (chaos.stack.volume / "leaving").iterdir()]
    queues = await chaos.queue_lengths()
    if any(queues.values()):
        return f"jobs left: {queues}"
    if not usage.reconciled:
        return "the index does not stand for the volume"
    if fetches or usage.reserved or incoming:
        return f"fetches {fetches}, reserved {usage.reserved}, incoming {incoming}"
    if indexed != on_disk or leaving:
        return f"index and disk differ: {set(indexed.items()) ^ set(on_disk.items())}, leaving {leaving}"
    if usage.used != sum(map(footprint, on_disk.values())):
        return f"used {usage.used}, on disk {sum(map(footprint, on_disk.values()))}"
    if usage.used > chaos.limit:
        return f"used {usage.used} of {chaos.limit}"
    return None


def check_volume(chaos: ChaosHarness, known: Mapping[str, DemoObject]) -> None:
    """Every object on the volume is complete and right."""
    for path in chaos.stack.volume.glob("objects/*/*"):
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
