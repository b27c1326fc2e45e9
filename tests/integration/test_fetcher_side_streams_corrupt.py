"""Wrong bytes that reach a fetch by a side stream."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest

from distributor_node.services.demo.faults import Fault, Match
from distributor_node.shared.adapters.peers import Hop
from distributor_node.shared.adapters.sources import SourceClient
from distributor_node.shared.domain.jobs import Ack
from distributor_node.shared.domain.objects import ObjectId
from distributor_node.shared.domain.peers import PeerUse
from tests.integration.fetcher_harness import LIMITS, fetcher_harness
from tests.integration.test_fetcher_side_streams import DATA, MIB, start, viewers


async def test_a_stream_that_was_passed_writes_nothing(tmp_path: Path) -> None:
    """1. A side stream waits for its first byte. 2. The main stream passes it, and hashes those bytes. 3. It meets an
    extent, and waits for the stream that writes that. 4. The first one gets its bytes, which are wrong."""
    async with fetcher_harness(tmp_path / "volume", [DATA]) as harness:
        faults = harness.nodes[0].faults
        late = Fault(latency_before_headers=0.9, flip_byte_at=3 * MIB + 10)
        faults.add(late, Match(ranged=True, nth=1))
        faults.add(Fault(bytes_per_second=4 * MIB))
        fetching = start(harness)
        with viewers(harness, 3 * MIB):
            await harness.nodes[0].requests.wait_for(lambda log: len(log) == 2)
            with viewers(harness, 3 * MIB + MIB // 2):
                assert await fetching == Ack("fetched")
        ranges = [record.range for record in harness.nodes[0].requests]
        assert (ranges[1] or "").startswith(f"bytes={3 * MIB}-"), ranges
        assert harness.stored() == DATA


class OnePeer:
    """A fleet whose home of all objects is one server."""

    def __init__(self, url: str, client: SourceClient) -> None:
        self.url, self.client = url, client

    def hops(self, object_id: ObjectId, use: PeerUse) -> Sequence[Hop]:
        return [Hop(self.url, {}, only_if_cached=False)] if use is PeerUse.FETCH else []

    def has(self, url: str) -> bool:
        return url == self.url


async def test_after_wrong_bytes_side_streams_ask_no_peer(tmp_path: Path) -> None:
    """1. The main stream reads from the source, a side stream from a peer. 2. The hash is wrong. It may be either."""
    async with fetcher_harness(tmp_path / "volume", [DATA, DATA]) as harness, SourceClient(LIMITS) as client:
        source, peer = harness.nodes
        source.faults.add(Fault(bytes_per_second=8 * MIB))
        peer.faults.add(Fault(status=404), Match(ranged=False))
        peer.faults.add(Fault(bytes_per_second=8 * MIB, flip_byte_at=9 * MIB))
        harness.failover_reader._peers = OnePeer(harness.sources[1], client)  # type: ignore[assignment]
        harness.nodes = [source]
        fetching = start(harness)
        with viewers(harness, 8 * MIB):
            async with asyncio.timeout(15):
                assert await fetching == Ack("fetched")
        assert harness.stored() == DATA
        assert len([record for record in peer.requests if record.range is not None]) == 1


async def test_a_source_of_wrong_bytes_is_blamed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the hash of its attempt, and not again when the right bytes are there to compare with."""
    async with fetcher_harness(tmp_path / "volume", [DATA, DATA]) as harness:
        harness.nodes[0].faults.add(Fault(flip_byte_at=MIB))
        reader, blamed = harness.failover_reader, list[str]()
        report = reader.report_corrupt

        def note(url: str, object_id: ObjectId | None) -> None:
            blamed.append(url)
            report(url, object_id)

        monkeypatch.setattr(reader, "report_corrupt", note)
        assert await start(harness) == Ack("fetched")
        assert harness.stored() == DATA
        assert blamed == [harness.sources[0]]
