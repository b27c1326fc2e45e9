"""A hundred thousand objects on the volume, and a state store that knows none of them."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path

import pytest
from blake3 import blake3

from distributor_node.services.demo.objects import DemoObject, bytes_object
from distributor_node.shared.adapters.volume import Volume
from distributor_node.shared.adapters.volume.layout import shard
from distributor_node.shared.adapters.volume.records import encode_record
from distributor_node.shared.domain.objects import ContentHash, ObjectId, StoredRecord, entity_tag
from tests.chaos.figures import record_result
from tests.chaos.harness import ChaosHarness
from tests.chaos.watchers import resident_bytes
from tests.end_to_end.client import get

COUNT = 100_000
SIZE = 64


def body_of(number: int) -> bytes:
    return f"{number:08d}".encode() * (SIZE // 8)


def fill(root: Path) -> None:
    """Objects with their records, as fetchers would have left them; quicker."""
    Volume(root).prepare()
    for number in range(1, COUNT + 1):
        object_id, body = ObjectId(str(number)), body_of(number)
        content_hash = ContentHash("blake3", blake3(body).digest())
        etag = entity_tag(content_hash)
        record = StoredRecord(object_id, SIZE, etag, content_hash, "text/plain", 1_700_000_000)
        for kind, content in (("objects", body), ("records", encode_record(record))):
            folder = root / kind / shard(object_id)
            folder.mkdir(exist_ok=True)
            (folder / object_id).write_bytes(content)


@pytest.mark.chaos
@pytest.mark.timeout(600)
async def test_a_hundred_thousand_objects_are_served_before_the_index_is_rebuilt(chaos: ChaosHarness) -> None:
    await asyncio.to_thread(fill, chaos.stack.volume)
    listed: list[DemoObject] = [bytes_object("900001", b"another")]
    chaos.limit = 10 << 30
    chaos.stack.environment["DISTRIBUTOR_STORAGE__LIMIT"] = str(chaos.limit)
    chaos.stack.manifest.write_text(json.dumps({"version": 1, "objects": [], "base_urls": []}))
    chaos.publish(listed)
    began = time.monotonic()
    evictor, api = chaos.stack.add("evictor"), chaos.stack.add("api")
    first_hit = None
    while first_hit is None:
        try:
            answer = await get(chaos.stack.url("77777"), timeout=2)
            if answer.headers.get("x-cache") == "hit":
                assert answer.body == body_of(77_777)
                first_hit = time.monotonic() - began
        except (OSError, TimeoutError):
            await asyncio.sleep(0.02)
    async with chaos.state() as state:
        reconciled_at_first_hit = (await state.usage()).reconciled
    assert not reconciled_at_first_hit, "the hit came before the index stood for the volume"
    await chaos.until_reconciled(timeout=300)
    rebuilt = time.monotonic() - began
    assert evictor.process is not None
    assert api.process is not None
    async with chaos.state() as state:
        usage = await state.usage()
    assert usage.objects == COUNT
    record_result(
        "cold_start_100000", first_hit_after=first_hit, index_rebuilt_after=rebuilt,
        evictor_bytes=resident_bytes(evictor.process.pid), api_bytes=resident_bytes(api.process.pid), failed=0,
    )  # fmt: skip
