"""What the operator API says of one object: its state, and its place in the order of eviction."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any, cast

import pytest

from distributor_node.services.api.dashboard.feed import Feed
from distributor_node.services.api.dashboard.server import DashboardServer
from distributor_node.services.api.operator.explain import ObjectExplainer, in_words
from distributor_node.shared.domain.eviction import POLICY_NAMES
from distributor_node.shared.domain.eviction.gdsf import Gdsf
from distributor_node.shared.domain.eviction.policy import FIRST_COST_FACTOR, NO_BASIS, PriorityBasis
from distributor_node.shared.domain.objects import Assignment, ObjectId
from distributor_node.shared.domain.space import footprint
from distributor_node.shared.ports.state_store import Access, IndexEntry, PolicyState
from distributor_node.shared.settings.model import DashboardSettings
from distributor_node.shared.waiting import background
from tests.end_to_end.client import get
from tests.integration.evictor_harness import (
    LIMIT,
    SIZE,
    EvictorHarness,
    record_of,
)
from tests.waiting import eventually


def explainer_of(harness: EvictorHarness, policy: str = "gdsf") -> ObjectExplainer:
    return ObjectExplainer(harness.state, harness.volume, harness.settings(policy=policy).evictor)


async def explain(harness: EvictorHarness, name: str, policy: str = "gdsf") -> dict[str, Any]:
    return await explainer_of(harness, policy).explain(ObjectId(name))


async def reconciled(harness: EvictorHarness) -> None:
    """As if an evictor had found an empty volume."""
    await harness.state.set_reconciled(await harness.term())


@pytest.mark.parametrize("policy", POLICY_NAMES)
async def test_the_evictor_takes_the_objects_that_stand_before_the_others(
    harness: EvictorHarness, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distributor_node.services.evictor.leader_tasks.SAVE_INTERVAL", 0.3)
    names = [f"o{number}" for number in range(8)]
    async with harness.evictor(policy=policy):
        await eventually(harness.reconciled)
        await harness.store(*names, age=36_000)
        await harness.state.record_accesses([Access(ObjectId("o0"), 6, time.time() - 7200)])

        async def counted() -> bool:
            return (await harness.entries())["o0"].frequency == 7

        await eventually(counted)
        explained = {name: await explain(harness, name, policy) for name in names}
        order = sorted(names, key=lambda name: explained[name]["bytesBefore"])
        assert [explained[name]["bytesBefore"] for name in order] == [
            number * footprint(SIZE) for number in range(8)
        ]
        assert [explained[name]["objectsBefore"] for name in order] == list(range(8))
        assert order[-1] == "o0", "it has most views, and was accessed last"
        assert (explained["o0"]["policy"], explained["o0"]["views"]) == (policy, 7)
        assert (explained["o0"]["priority"] is not None) is (policy == "gdsf")
        await harness.state.request_space(ObjectId("new"), 5 * SIZE, 60.0)

        async def freed() -> bool:
            return LIMIT - await harness.used() >= footprint(5 * SIZE)

        await eventually(freed)
        left = set(await harness.entries())
        assert left == set(order[len(names) - len(left) :])


async def test_fields_of_a_stored_object(harness: EvictorHarness) -> None:
    await reconciled(harness)
    await harness.store("one", age=600)
    assert await explain(harness, "one") == {
        "id": "one",
        "path": None,
        "state": "stored",
        "size": SIZE,
        "hash": str(record_of("one", harness.path_of("one").read_bytes()).content_hash),
        "views": 1,
        "lastAccess": pytest.approx(time.time() - 600, abs=30),
        "policy": "gdsf",
        "priority": pytest.approx(NO_BASIS.first_weight * 2**20 * (1 / SIZE + 1 / (28 * SIZE))),
        "inflation": 0.0,
        "bytesBefore": 0,
        "objectsBefore": 0,
        "pinned": False,
        "sending": False,
        "fetch": None,
        "failure": None,
    }


async def test_a_pinned_object_has_no_place_and_stands_before_no_other(harness: EvictorHarness) -> None:
    await reconciled(harness)
    await harness.store("old", "new", age=6000)
    assert (await explain(harness, "new"))["bytesBefore"] == footprint(SIZE)
    await harness.state.change_pins(pin=[ObjectId("old")])
    pinned = await explain(harness, "old")
    assert (pinned["pinned"], pinned["state"], pinned["bytesBefore"]) == (True, "stored", None)
    assert (await explain(harness, "new"))["bytesBefore"] == 0


async def test_an_object_that_is_being_sent_and_then_purged(harness: EvictorHarness) -> None:
    async with harness.evictor():
        await eventually(harness.reconciled)
        await harness.store("one", age=600)
        sent = harness.volume.open_object(ObjectId("one"))
        assert sent is not None
        assert sent.lock_shared()
        assert (await explain(harness, "one"))["sending"] is True
        await harness.state.request_purges([ObjectId("one")])

        async def leaving() -> bool:
            found = await explain(harness, "one")
            return found["state"] == "leaving" and found["bytesBefore"] is None and found["sending"] is True

        await eventually(leaving)
        sent.close()

        async def gone() -> bool:
            found = await explain(harness, "one")
            return found["state"] == "absent" and found["sending"] is False

        await eventually(gone)


async def test_a_partial_object_stands_among_the_others(harness: EvictorHarness) -> None:
    await reconciled(harness)
    await harness.park("film", 8000, 3 * SIZE)
    await harness.store("old", "new", age=6000)
    term = await harness.term()
    now = time.time()
    entries = [
        IndexEntry(ObjectId(name), 0, 1, now - age, priority)
        for name, age, priority in (("old", 6000, 5.0), ("film", 3000, 6.0), ("new", 60, 7.0))
    ]
    basis = PriorityBasis(0.0, Gdsf.mark, FIRST_COST_FACTOR * SIZE, 1.0, float(SIZE))
    await harness.state.save_policy(term, entries, PolicyState(basis))
    film = await explain(harness, "film")
    assert (film["state"], film["size"], film["views"]) == ("parked", 3 * SIZE, 1)
    assert (film["lastAccess"], film["priority"]) == (pytest.approx(now - 3000, abs=1), 6.0)
    assert (film["bytesBefore"], film["objectsBefore"]) == (footprint(SIZE), 1)
    assert (film["fetch"]["bytes"], film["fetch"]["reserved"]) == (8000, footprint(8000))
    assert (await explain(harness, "new"))["bytesBefore"] == footprint(SIZE) + footprint(8000)
    words = in_words(film, {"at": now, "reason": "space_requested", "partial": True, "views": 1}, None)
    assert words[0].startswith("It is not being fetched: 7.8 KiB of 58.6 KiB are on disk, viewed once.")
    assert words[-1].startswith("What was on disk of it was evicted 0 s ago: a fetch was waiting for space.")


async def test_states_of_objects_that_are_not_stored(harness: EvictorHarness) -> None:
    await reconciled(harness)
    one = ObjectId("one")
    absent = await explain(harness, "one")
    assert (absent["state"], absent["size"], absent["hash"], absent["views"]) == ("absent", None, None, None)
    await harness.state.claim(one, "api-1")
    assert (await explain(harness, "one"))["state"] == "claimed"
    await harness.state.mark_queued(one, "api-1")
    assert (await explain(harness, "one"))["state"] == "queued"
    lease = await harness.begin_fetch("one")
    harness.leave_partial("one", 5000)
    fetching = await explain(harness, "one")
    assert (fetching["state"], fetching["size"], fetching["bytesBefore"]) == ("fetching", SIZE, None)
    assert (fetching["fetch"]["bytes"], fetching["fetch"]["worker"]) == (5000, "worker-1")
    await harness.state.park(lease)
    assert (await explain(harness, "one"))["state"] == "parked"
    await harness.state.record_failure(ObjectId("two"), "no source", 60.0)
    failed = await explain(harness, "two")
    assert (failed["state"], failed["failure"]["reason"]) == ("failed", "no source")
    harness.put_file("three")
    unindexed = await explain(harness, "three")
    assert (unindexed["state"], unindexed["size"]) == ("unindexed", SIZE)
    assert unindexed["hash"] is not None
    await harness.store("four")
    harness.path_of("four").unlink()
    assert (await explain(harness, "four"))["state"] == "missing"


class NumbersOnly:
    """As the catalog of the chain."""

    def can_have(self, object_id: ObjectId) -> bool:
        return object_id.isdigit()

    async def look_up(self, object_id: ObjectId) -> None:
        """Nothing is there."""


async def test_the_page_calls_an_id_malformed_that_the_catalog_cannot_have(harness: EvictorHarness) -> None:
    await reconciled(harness)
    await harness.store("kept")
    assigned = SimpleNamespace(current=Assignment())
    parts = {"catalog": NumbersOnly(), "settings": harness.settings(), "assignment": assigned}
    context = cast("Any", SimpleNamespace(**parts))
    feed = Feed(context, cast("Any", None), cast("Any", None), explainer_of(harness))
    server = DashboardServer(DashboardSettings(port=0), feed, harness.state, lambda: None)
    async with background(server.run(), name="dashboard"):
        await eventually(lambda: server.port is not None)
        page = f"http://127.0.0.1:{server.port}/explain.json?id="
        answers = {name: await get(page + name) for name in ("abc", "..", "7", "kept")}
    assert [answer.status for answer in answers.values()] == [400, 400, 200, 200]
    assert answers["abc"].json() == {
        "message": "malformed object id: this node's catalog has no such ids, got 'abc'"
    }
    assert answers["7"].json()["words"][-1] == "The catalog says that it does not exist."
    assert answers["7"].json()["state"] == "unknown"
    assert answers["kept"].json()["state"] == "stored", "what is here is explained, whatever its id"
