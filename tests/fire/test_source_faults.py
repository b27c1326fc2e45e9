"""Sources that hang, cut, lie, drip or speak no TLS: another takes over, or the client is told so clearly."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import pytest

from services.demo.knobs import Behaviour, Match
from services.demo.objects import MIB, DemoObject, generated_object
from tests.end_to_end.client import get
from tests.fire.asking import ask_right, asked_until_whole, is_right
from tests.fire.figures import note
from tests.fire.inspection import settled
from tests.fire.world import FireWorld

SIZE = 2 * MIB
FAULTS = {
    "hangs_before_headers": Behaviour(hang_before_headers=True),
    "hangs_mid_body": Behaviour(hang_after=MIB),
    "cuts": Behaviour(cut_after=MIB),
    "resets": Behaviour(cut_after=MIB, cut_by_reset=True),
    "too_short": Behaviour(content_length_delta=-1000, body_delta=-1000),
    "too_long": Behaviour(content_length_delta=1000, body_delta=1000),
    "promises_too_much": Behaviour(content_length_delta=1000),
    "wrong_bytes": Behaviour(flip_byte_at=MIB + 5),
    "wrong_bytes_at_the_end": Behaviour(flip_byte_at=SIZE - 1),
    "status_404": Behaviour(status=404),
    "status_500": Behaviour(status=500),
    "status_403": Behaviour(status=403),
    "redirects": Behaviour(redirect_to="http://127.0.0.1:9/elsewhere"),
    "drips": Behaviour(drip_bytes_per_second=500, drip_after=MIB),
    "endless": Behaviour(endless_body=True),
    "gzip": Behaviour(gzip=True),
}
QUICK = ("hangs_mid_body", "cuts", "wrong_bytes", "too_long", "status_404", "gzip", "endless")
LIES = {"wrong_bytes", "wrong_bytes_at_the_end", "too_long", "endless"}
"""What shows only when the whole body has come: an answer that has begun can then only be cut, and asked again."""


def one_of_each() -> dict[str, DemoObject]:
    return {name: generated_object(str(number + 1), SIZE) for number, name in enumerate(FAULTS)}


async def up_with_first_asked_first(fire: FireWorld, items: Sequence[DemoObject]) -> None:
    """Sources are asked in the order of how quickly they answer probes."""
    fire.second.knobs.add(Behaviour(latency_before_headers=0.5), Match(endpoint="version"))
    await fire.up(items, 100 * MIB)
    await fire.second.requests.wait_for(lambda log: any("version" in record.path for record in log), 15)
    await asyncio.sleep(3)  # until it is probed, and what was seen is shared


async def another_takes_over(fire: FireWorld, name: str) -> None:
    item = generated_object("1", SIZE)
    await up_with_first_asked_first(fire, [item])
    fire.first.knobs.add(FAULTS[name], Match(endpoint="files"))
    began = time.monotonic()
    if name in LIES:
        cuts = await asked_until_whole(fire, item)
    else:
        cuts = 0
        await ask_right(fire, item)
    took = time.monotonic() - began
    await fire.stack.until_hit("1")
    assert fire.first.requests.of("1", "GET"), "the fault was never met"
    if name in ("cuts", "hangs_mid_body", "drips"):
        ranges = [record.range for record in fire.second.requests.of("1", "GET")]
        assert any(text and text.startswith("bytes=") and text != "bytes=0-" for text in ranges), ranges
    await settled(fire, [item])
    note(f"source_{name}", requests=1 + cuts, cut=cuts, whole_after=took, failed=0)


@pytest.mark.fire
@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", FAULTS)
async def test_another_source_takes_over(fire: FireWorld, name: str) -> None:
    await another_takes_over(fire, name)


@pytest.mark.timeout(180)
async def test_another_takes_over_from_sources_of_many_kinds(fire: FireWorld) -> None:
    """The quick form: one node, one object for each fault."""
    items = {name: item for name, item in one_of_each().items() if name in QUICK}
    await up_with_first_asked_first(fire, list(items.values()))
    for name, item in items.items():
        fire.first.knobs.clear()
        fire.first.knobs.add(FAULTS[name], Match(endpoint="files"))
        await (asked_until_whole(fire, item) if name in LIES else ask_right(fire, item))
        await fire.stack.until_hit(item.object_id)
    await settled(fire, list(items.values()))


@pytest.mark.fire
@pytest.mark.timeout(180)
@pytest.mark.parametrize("name", FAULTS)
async def test_where_all_sources_fail_the_client_is_told(fire: FireWorld, name: str) -> None:
    item = generated_object("1", SIZE)
    await fire.up([item], 100 * MIB)
    for node in (fire.first, fire.second):
        node.knobs.add(FAULTS[name])
    began = time.monotonic()
    answer = await get(fire.stack.url("1"), timeout=60)
    took = time.monotonic() - began
    if answer.status == 200 and answer.complete:
        # A mebibyte from each, one after the other, are the whole of it
        assert name in ("hangs_mid_body", "cuts", "resets", "drips")
        assert is_right(answer, item)
    if answer.status != 200:
        assert answer.status in (502, 504), (answer.status, answer.body)
        assert answer.headers["content-type"] == "application/json"
        assert answer.headers["cache-control"] == "no-store"
        assert answer.json()["message"]
    for node in (fire.first, fire.second):
        node.knobs.clear()
    cuts = await asked_until_whole(fire, item, patience=20)
    await settled(fire, [item])
    note(f"all_sources_{name}", status=answer.status, told_after=took, cut_afterwards=cuts, failed=0)


@pytest.mark.fire
@pytest.mark.timeout(120)
@pytest.mark.parametrize("how", ["tls_error", "refused", "black_hole"])
async def test_a_source_that_cannot_be_talked_to(fire: FireWorld, how: str) -> None:
    item = generated_object("1", SIZE)
    await up_with_first_asked_first(fire, [item])
    connections = fire.to_first.connections
    if how == "tls_error":
        bases = [f"https://127.0.0.1:{fire.first.port}/api/v1/files/", f"{fire.second.api_url}/files/"]
        fire.stack.write_manifest([item], bases)
        await asyncio.sleep(1.5)  # until the manifest is read again
    fire.to_first.refusing = how == "refused"
    fire.to_first.deaf = how == "black_hole"
    began = time.monotonic()
    await ask_right(fire, item)
    took = time.monotonic() - began
    await fire.stack.until_hit("1")
    await settled(fire, [item])
    assert how == "tls_error" or fire.to_first.connections > connections, "the fault was never met"
    note(f"source_{how}", requests=1, whole_after=took, failed=0)
