"""Jobs are hints: what the catalog says of an object decides what is fetched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import pytest

from distributor_node.services.fetcher.admission import JobChecker
from distributor_node.shared.adapters.state_common import StateTimeouts
from distributor_node.shared.adapters.state_memory import MemoryStateStore
from distributor_node.shared.domain.errors import CatalogUnavailable
from distributor_node.shared.domain.jobs import Ack, FetchJob, Retry
from distributor_node.shared.domain.objects import (
    Assignment,
    ContentHash,
    DistributionBucket,
    MediaObject,
    ObjectId,
)
from distributor_node.shared.ports.catalog import Catalog

NOW = 1_800_000_000.0
ID = ObjectId("7")
KNOWN = MediaObject(
    ID,
    100,
    ContentHash("sha256", b"k" * 32),
    "image/png",
    (DistributionBucket("0:1"),),
    sources=("http://ours/7",),
)
FORGED = replace(
    KNOWN, content_hash=ContentHash("sha256", b"f" * 32), media_type="text/html", sources=("http://other/7",)
)


@dataclass(slots=True)
class ScriptedAnswers:
    """The look-ups of a catalog. An answer stays until it is forgotten, as in a cache; the last one stays for ever."""

    answers: list[MediaObject | CatalogUnavailable | None]
    lookups: int = field(default=0)

    async def look_up(self, object_id: ObjectId) -> MediaObject | None:
        assert object_id == ID
        self.lookups += 1
        if isinstance(self.answers[0], CatalogUnavailable):
            raise self.answers[0]
        return self.answers[0]

    async def forget(self, outdated: MediaObject) -> None:
        assert outdated == self.answers[0]
        if len(self.answers) > 1:
            self.answers.pop(0)


@dataclass(slots=True)
class Harness:
    state: MemoryStateStore
    catalog: ScriptedAnswers
    checker: JobChecker


async def make(answers: Sequence[MediaObject | CatalogUnavailable | None], *, claimed: bool) -> Harness:
    state = MemoryStateStore(1_000_000, StateTimeouts(), lambda: NOW)
    if claimed:
        assert (await state.claim(ID, "api-1")).won
        await state.mark_queued(ID, "api-1")
    catalog = ScriptedAnswers(list(answers))
    ours = Assignment(frozenset({"0:1"}))
    checker = JobChecker(cast("Catalog", catalog), state, lambda: ours, max_age=60.0, clock=lambda: NOW)
    return Harness(state, catalog, checker)


def job(claimed: MediaObject, age: float = 1.0) -> FetchJob:
    return FetchJob(claimed, "r-1", NOW - age)


async def test_an_old_job_is_fetched_as_the_catalog_describes_its_object() -> None:
    harness = await make([KNOWN], claimed=False)
    old = job(FORGED, age=3600)
    assert await harness.checker.check(old) == replace(old, media_object=KNOWN)


async def test_a_live_job_that_differs_makes_the_catalog_be_asked_again() -> None:
    newer = replace(KNOWN, content_hash=ContentHash("sha256", b"n" * 32))
    harness = await make([KNOWN, newer], claimed=True)
    assert await harness.checker.check(job(newer)) == job(newer)
    assert harness.catalog.lookups == 2


async def test_a_forged_job_is_corrected_although_the_object_is_claimed() -> None:
    harness = await make([KNOWN], claimed=True)
    checked = await harness.checker.check(job(FORGED))
    assert isinstance(checked, FetchJob)
    assert checked.media_object == KNOWN


async def test_a_job_that_agrees_costs_one_look_up() -> None:
    harness = await make([KNOWN], claimed=True)
    agreeing = job(KNOWN)
    assert await harness.checker.check(agreeing) is agreeing
    assert harness.catalog.lookups == 1


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (None, "does_not_exist"),
        (replace(KNOWN, buckets=(DistributionBucket("0:2"),)), "not_served"),
        (replace(KNOWN, accepted=False), "not_uploaded"),
        (replace(KNOWN, size=None), "unknown_size"),
    ],
)
async def test_a_job_for_an_object_that_is_not_ours_is_dropped_and_its_claim_ends(
    answer: MediaObject | None, reason: str
) -> None:
    harness = await make([answer], claimed=True)
    assert await harness.checker.check(job(KNOWN)) == Ack(reason)
    assert (await harness.state.find(ID)).fetch is None


@pytest.mark.parametrize(
    ("claimed", "age", "believed"), [(True, 1.0, True), (True, 61.0, False), (False, 1.0, False)]
)
async def test_without_the_catalog_only_a_young_job_with_a_claim_is_believed(
    claimed: bool, age: float, believed: bool
) -> None:
    harness = await make([CatalogUnavailable("down")], claimed=claimed)
    asked = job(KNOWN, age)
    assert await harness.checker.check(asked) == (asked if believed else Retry("catalog: down"))


class CatalogOfPaths:
    """Knows an object by its path alone, as an origin does."""

    def __init__(self, known: MediaObject) -> None:
        self._known = known

    async def look_up(self, object_id: ObjectId) -> MediaObject | None:
        if object_id.path != "films/a%20b.mp4":
            raise CatalogUnavailable("the digest does not tell the path")
        return self._known


@pytest.mark.parametrize("claimed", [False, True])
async def test_a_job_of_an_object_that_is_named_by_a_path_is_compared_too(*, claimed: bool) -> None:
    named = ObjectId.parse_path("films/a%20b.mp4")
    read_back = ObjectId(named)  # as from a message
    known = replace(KNOWN, object_id=named, name=named.path)
    state = MemoryStateStore(1_000_000, StateTimeouts(), lambda: NOW)
    if claimed:
        assert (await state.claim(named, "api-1")).won
    ours = Assignment(frozenset({"0:1"}))
    catalog = cast("Catalog", CatalogOfPaths(known))
    checker = JobChecker(catalog, state, lambda: ours, max_age=60.0, clock=lambda: NOW)
    forged = job(replace(known, object_id=read_back, sources=("http://other/x",)))
    checked = await checker.check(forged)
    assert isinstance(checked, FetchJob)
    assert checked.media_object.sources == KNOWN.sources
    unnamed = job(replace(forged.media_object, name="films/another.mp4"), age=3600)
    assert isinstance(await checker.check(unnamed), Retry), "it is not the digest of that path"


@pytest.mark.parametrize("newer", [False, True])
async def test_a_dropped_job_ends_its_own_claim_and_no_newer_one(newer: bool) -> None:
    """1. A job waits in the queue. 2. Its claim ends, and the object is claimed again. 3. The job is delivered."""
    harness = await make([None], claimed=False)
    claim = await harness.state.claim(ID, "api-1")
    if newer:
        await harness.state.release_claim(ID, "api-1")
        assert (await harness.state.claim(ID, "api-1")).won
    assert await harness.checker.check(replace(job(KNOWN), claim=claim.serial)) == Ack("does_not_exist")
    assert ((await harness.state.find(ID)).fetch is not None) is newer
