"""Every answer of the asset path is one that the OpenAPI document describes, whatever state the object is in, and
whatever a request asks of it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import positive_data_acceptance

from distributor_node.services.demo.faults import Fault, Match
from distributor_node.shared.domain.objects import Assignment, DistributionBucket
from tests.integration.assets_harness import AssetsHarness, ManualFetch, assets_harness

SIZE = 5000
STORED, PENDING, MISSING, UNKNOWN, FOREIGN, NOT_UPLOADED, BROKEN, SLOW = (
    str(number) for number in range(1, 9)
)
PATH = "/api/v1/assets/{objectId}"
NOT_OURS = [not_a_server_error, positive_data_acceptance]
"""Checks that want other statuses than those described: 5xx where sources fail, 412, 416 and 421 for good requests."""
OURS = (DistributionBucket("0:1"),)


@dataclass
class Described:
    """A node with an object in each state, and the document that its answers are held against."""

    harness: AssetsHarness
    fetch: ManualFetch
    operations: Any
    seen: set[tuple[str, int]] = field(default_factory=set)

    async def ask(self, object_id: str, headers: dict[str, str] | None = None) -> set[int]:
        """GET and HEAD; the statuses."""
        await self.harness.context.state.renew(self.fetch.lease, None)
        statuses = set()
        for method in ("GET", "HEAD"):
            case = self.operations[method].Case(
                path_parameters={"objectId": object_id}, headers=headers or {}
            )
            status = await asyncio.to_thread(self.validated, case)
            self.seen.add((method, status))
            statuses.add(status)
        return statuses

    def validated(self, case: Any) -> int:
        """Ask, and hold the answer against the document; AssertionErrors tell where it differs."""
        url = f"http://127.0.0.1:{self.harness.port}"
        response = case.call_and_validate(base_url=url, excluded_checks=NOT_OURS)
        status: int = response.status_code
        return status


@pytest.fixture
async def described(tmp_path: Path) -> AsyncIterator[Described]:
    document = json.loads(files("distributor_node.services.api").joinpath("openapi.json").read_text())
    async with assets_harness(tmp_path, first_byte_wait=0.05, proxied_first_byte_wait=0.5) as harness:
        for object_id in (STORED, PENDING, MISSING, BROKEN, SLOW):
            harness.add(object_id, SIZE, buckets=OURS)
        harness.add(FOREIGN, SIZE, buckets=(DistributionBucket("9:9"),))
        harness.add(NOT_UPLOADED, SIZE, buckets=OURS, accepted=False)
        harness.context.assignment.current = Assignment(bucket_ids=frozenset({"0:1"}))
        harness.store(STORED)
        fetch = await harness.begin(PENDING, written=SIZE)
        fetch.verify()
        for node in (harness.node, harness.second):
            node.faults.add(Fault(status=500), Match(object_id=BROKEN))
            node.faults.add(Fault(hang_before_headers=True), Match(object_id=SLOW))
        yield Described(harness, fetch, schemathesis.openapi.from_dict(document)[PATH])
        fetch.partial.close()


async def test_every_status_is_as_described(described: Described) -> None:
    etag = described.harness.catalog.objects[STORED].etag or ""
    for object_id in (STORED, PENDING, MISSING):
        assert await described.ask(object_id) == {200}
        assert await described.ask(object_id, {"Range": "bytes=10-99"}) == {206, 200}
        assert await described.ask(object_id, {"Range": f"bytes={SIZE}-"}) == {416, 200}
        assert await described.ask(object_id, {"If-None-Match": "*"}) == {304}
        assert await described.ask(object_id, {"If-Match": '"other"'}) == {412}
    assert await described.ask(STORED, {"Range": "bytes=0-0", "If-Range": etag}) == {206, 200}
    assert await described.ask(STORED, {"Range": "bytes=0-0", "If-Range": '"other"'}) == {200}
    assert await described.ask(UNKNOWN) == {404}
    assert await described.ask(FOREIGN) == {421}
    assert await described.ask(NOT_UPLOADED) == {404}
    assert await described.ask("control\x01character") == {400}
    assert await described.ask(BROKEN) == {502, 200}
    assert await described.ask(SLOW) == {504, 200}
    described.harness.catalog.down = True
    assert await described.ask(UNKNOWN) == {503}
    both = {200, 304, 400, 404, 412, 421, 503}
    assert described.seen == {(method, status) for method in ("GET", "HEAD") for status in both} | {
        ("GET", status) for status in (206, 416, 502, 504)
    }


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_whatever_the_headers_say(described: Described, method: str) -> None:
    ids = st.sampled_from((STORED, PENDING, UNKNOWN, FOREIGN, NOT_UPLOADED))

    @given(case=described.operations[method].as_strategy(), object_id=ids)
    @settings(
        max_examples=40,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def keeps_to_it(case: Any, object_id: str) -> None:
        case.path_parameters = {"objectId": object_id}
        assert described.validated(case) < 500

    await asyncio.to_thread(keeps_to_it)
