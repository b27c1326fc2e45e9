"""Sources that hang, cut, corrupt, drip or fail in TLS: another source takes over, or the client gets an error."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import pytest

from distributor_node.services.demo.faults import Fault, Match
from distributor_node.services.demo.objects import MIB, DemoObject, generated_object
from tests.chaos.figures import record_result
from tests.chaos.harness import ChaosHarness
from tests.chaos.http import get_correct, get_until_complete, is_correct
from tests.chaos.invariants import wait_until_settled
from tests.end_to_end.client import get

SIZE = 2 * MIB
FAULTS = {
    "hangs_before_headers": Fault(hang_before_headers=True),
    "hangs_mid_body": Fault(hang_after=MIB),
    "cuts": Fault(cut_after=MIB),
    "resets": Fault(cut_after=MIB, cut_by_reset=True),
    "too_short": Fault(content_length_delta=-1000, body_delta=-1000),
    "too_long": Fault(content_length_delta=1000, body_delta=1000),
    "promises_too_much": Fault(content_length_delta=1000),
    "wrong_bytes": Fault(flip_byte_at=MIB + 5),
    "wrong_bytes_at_the_end": Fault(flip_byte_at=SIZE - 1),
    "status_404": Fault(status=404),
    "status_500": Fault(status=500),
    "status_403": Fault(status=403),
    "redirects": Fault(redirect_to="http://127.0.0.1:9/elsewhere"),
    "drips": Fault(drip_bytes_per_second=500, drip_after=MIB),
    "endless": Fault(endless_body=True),
    "gzip": Fault(gzip=True),
}
QUICK = ("hangs_mid_body", "cuts", "wrong_bytes", "too_long", "status_404", "gzip", "endless")
DETECTED_AT_END = {"wrong_bytes", "wrong_bytes_at_the_end", "too_long", "endless"}
"""What shows only when the whole body has come: an answer that has begun can then only be cut, and asked again."""


def one_object_per_fault() -> dict[str, DemoObject]:
    return {name: generated_object(str(number + 1), SIZE) for number, name in enumerate(FAULTS)}


async def start_with_first_preferred(chaos: ChaosHarness, items: Sequence[DemoObject]) -> None:
    """Sources are asked in the order of how quickly they answer probes."""
    chaos.second.faults.add(Fault(latency_before_headers=0.5), Match(endpoint="version"))
    await chaos.up(items, 100 * MIB)
    await chaos.second.requests.wait_for(lambda log: any("version" in record.path for record in log), 15)
    await asyncio.sleep(3)  # until it is probed, and what was seen is shared


async def assert_failover(chaos: ChaosHarness, name: str) -> None:
    item = generated_object("1", SIZE)
    await start_with_first_preferred(chaos, [item])
    chaos.first.faults.add(FAULTS[name], Match(endpoint="files"))
    began = time.monotonic()
    if name in DETECTED_AT_END:
        cuts = await get_until_complete(chaos, item)
    else:
        cuts = 0
        await get_correct(chaos, item)
    took = time.monotonic() - began
    await chaos.stack.until_hit("1")
    assert chaos.first.requests.of("1", "GET"), "the fault was never met"
    if name in ("cuts", "hangs_mid_body", "drips"):
        ranges = [record.range for record in chaos.second.requests.of("1", "GET")]
        assert any(text and text.startswith("bytes=") and text != "bytes=0-" for text in ranges), ranges
    await wait_until_settled(chaos, [item])
    record_result(f"source_{name}", requests=1 + cuts, cut=cuts, whole_after=took, failed=0)


@pytest.mark.chaos
@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", FAULTS)
async def test_another_source_takes_over(chaos: ChaosHarness, name: str) -> None:
    await assert_failover(chaos, name)


@pytest.mark.timeout(180)
async def test_failover_from_many_kinds_of_faults(chaos: ChaosHarness) -> None:
    """The quick form: one node, one object for each fault."""
    items = {name: item for name, item in one_object_per_fault().items() if name in QUICK}
    await start_with_first_preferred(chaos, list(items.values()))
    for name, item in items.items():
        chaos.first.faults.clear()
        chaos.first.faults.add(FAULTS[name], Match(endpoint="files"))
        await (get_until_complete(chaos, item) if name in DETECTED_AT_END else get_correct(chaos, item))
        await chaos.stack.until_hit(item.object_id)
    await wait_until_settled(chaos, list(items.values()))


@pytest.mark.chaos
@pytest.mark.timeout(180)
@pytest.mark.parametrize("name", FAULTS)
async def test_the_client_gets_an_error_when_all_sources_fail(chaos: ChaosHarness, name: str) -> None:
    item = generated_object("1", SIZE)
    await chaos.up([item], 100 * MIB)
    for node in (chaos.first, chaos.second):
        node.faults.add(FAULTS[name])
    began = time.monotonic()
    answer = await get(chaos.stack.url("1"), timeout=60)
    took = time.monotonic() - began
    if answer.status == 200 and answer.complete:
        # A mebibyte from each, one after the other, are the whole of it
        assert name in ("hangs_mid_body", "cuts", "resets", "drips")
        assert is_correct(answer, item)
    if answer.status != 200:
        assert answer.status in (502, 504), (answer.status, answer.body)
        assert answer.headers["content-type"] == "application/json"
        assert answer.headers["cache-control"] == "no-store"
        assert answer.json()["message"]
    for node in (chaos.first, chaos.second):
        node.faults.clear()
    cuts = await get_until_complete(chaos, item, retry_errors_for=20)
    await wait_until_settled(chaos, [item])
    record_result(f"all_sources_{name}", status=answer.status, told_after=took, cut_afterwards=cuts, failed=0)


@pytest.mark.chaos
@pytest.mark.timeout(120)
@pytest.mark.parametrize("how", ["tls_error", "refused", "black_hole"])
async def test_an_unreachable_source_is_skipped(chaos: ChaosHarness, how: str) -> None:
    item = generated_object("1", SIZE)
    await start_with_first_preferred(chaos, [item])
    connections = chaos.to_first.connections
    if how == "tls_error":
        bases = [f"https://127.0.0.1:{chaos.first.port}/api/v1/files/", f"{chaos.second.api_url}/files/"]
        chaos.stack.write_manifest([item], bases)
        await asyncio.sleep(1.5)  # until the manifest is read again
    chaos.to_first.refusing = how == "refused"
    chaos.to_first.unresponsive = how == "black_hole"
    began = time.monotonic()
    await get_correct(chaos, item)
    took = time.monotonic() - began
    await chaos.stack.until_hit("1")
    await wait_until_settled(chaos, [item])
    assert how == "tls_error" or chaos.to_first.connections > connections, "the fault was never met"
    record_result(f"source_{how}", requests=1, whole_after=took, failed=0)
