"""Rates, switches of sources, since when something is wrong, and one object in words."""

from __future__ import annotations

import time
from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from distributor_node.services.api.dashboard.feed import DownloadProgress, GrowthRates, ProblemTimes
from distributor_node.services.api.operator.explain import in_words
from distributor_node.services.command_line.top import screen
from distributor_node.shared.domain.objects import ObjectId
from distributor_node.shared.domain.space import EvictionReason
from distributor_node.shared.settings.sizes import plural

ONE, TWO = ObjectId("1"), ObjectId("2")


class TestRates:
    def test_none_at_first(self) -> None:
        assert GrowthRates().observe("a", 100, now=10) is None

    def test_growth_over_the_last_seconds(self) -> None:
        rates, rate = GrowthRates(), None
        for second in range(20):
            rate = rates.observe("a", 1000 * second if second < 10 else 9000, now=second)
            if second == 9:
                assert rate == 1000
        assert rate == 0

    def test_a_count_that_shrinks_begins_again(self) -> None:
        rates = GrowthRates()
        rates.observe("a", 5000, now=0)
        assert rates.observe("a", 0, now=1) is None
        assert rates.observe("a", 700, now=2) == 700

    def test_what_is_gone_is_forgotten(self) -> None:
        rates = GrowthRates()
        rates.observe("a", 0, now=0)
        rates.keep({"b"})
        assert rates.observe("a", 100, now=1) is None


class TestDownloads:
    def test_switches_of_the_source(self) -> None:
        progress, sources = DownloadProgress(), list[str]()
        for second, source in enumerate([None, "a:80", "a:80", "b:80", None, "b:80", "a:80"]):
            _, sources = progress.observe(ONE, 100 * second, source, now=second)
        assert sources == ["a:80", "b:80", "a:80"]
        progress.keep({TWO})
        assert progress.observe(ONE, 0, "c:80", now=20) == (None, ["c:80"])

    def test_the_list_of_switches_is_bounded(self) -> None:
        progress, sources = DownloadProgress(), list[str]()
        for second in range(100):
            _, sources = progress.observe(ONE, 0, f"{second}:80", now=second)
        assert len(sources) <= 20
        assert sources[-1] == "99:80"


def test_since_when_something_is_wrong() -> None:
    problems = ProblemTimes()
    assert problems.since("Volume", None, now=1) is None
    assert problems.since("Volume", "gone", now=2) == 2
    assert problems.since("Volume", "still gone", now=9) == 2
    assert problems.since("Volume", None, now=10) is None
    assert problems.since("Volume", "gone", now=12) == 12


def explained(**changes: Any) -> dict[str, Any]:
    return {
        "state": "absent", "size": None, "views": None, "lastAccess": None, "objectsBefore": None, "bytesBefore": None,
        "pinned": False, "sending": False, "fetch": None, "failure": None,
    } | changes  # fmt: skip


class TestInWords:
    def test_an_object_on_disk_and_its_place(self) -> None:
        stored = explained(
            state="stored",
            size=3 * 1024**2,
            views=4,
            lastAccess=time.time() - 600,
            objectsBefore=7,
            bytesBefore=2048,
        )
        assert in_words(stored, None, None) == [
            "It is on disk: 3.0 MiB, viewed 4 times, last read 10 min ago.",
            "7 objects (2.0 KiB) would be evicted before it.",
        ]
        nearly = explained(
            state="stored",
            size=1,
            views=1,
            lastAccess=time.time(),
            objectsBefore=0,
            bytesBefore=0,
            sending=True,
        )
        assert in_words(nearly, None, None)[-1] == "It would be the next to be evicted."

    @pytest.mark.parametrize("reason", list(EvictionReason))
    def test_each_reason_of_an_eviction_has_words(self, reason: EvictionReason) -> None:
        removed = {
            "reason": reason.value,
            "at": time.time() - 180,
            "idle_seconds": 7200.0,
            "views": 1,
            "bytes": 1,
        }
        [_, sentence] = in_words(explained(), removed, None)
        assert sentence.startswith("It was evicted 3 min ago: ")
        assert sentence.endswith("It had been viewed once, and not read for 2 h.")
        assert reason.value not in sentence

    def test_another_removal_and_what_the_catalog_says(self) -> None:
        removed = {"reason": "unassigned", "at": time.time(), "bytes": 1}
        assert in_words(explained(), removed, "The catalog says so.") == [
            "It is not here, and is not being fetched.",
            "It was removed 0 s ago: it is not assigned to this node any more.",
            "The catalog says so.",
        ]

    @pytest.mark.parametrize(
        "state", ["leaving", "missing", "unindexed", "claimed", "queued", "parked", "failed", "absent"]
    )
    def test_each_state_is_a_sentence(self, state: str) -> None:
        fetch = {"source": None, "bytes": 1024, "size": 2048}
        [sentence] = in_words(explained(state=state, fetch=fetch, views=1), None, None)
        assert sentence.endswith(".")

    def test_a_fetch_and_a_failure(self) -> None:
        fetch = {"source": "a:80", "bytes": 1024, "size": 2048}
        assert in_words(explained(state="fetching", fetch=fetch), None, None) == [
            "It is being fetched from a:80: 1.0 KiB of 2.0 KiB are on disk."
        ]
        failure = {"reason": "all sources failed", "secondsLeft": 30.0}
        assert in_words(explained(state="failed", failure=failure), None, None)[1] == (
            "The last fetch failed: all sources failed. It may be fetched again in 30 s."
        )


def test_one_of_a_kind_is_told_in_the_singular() -> None:
    assert (plural(1, "object"), plural(2.0, "object")) == ("1 object", "2 objects")
    assert (
        in_words(
            explained(
                state="stored", size=1, views=1, lastAccess=time.time(), objectsBefore=1, bytesBefore=10
            ),
            None,
            None,
        )[-1]
        == "1 object (10 B) would be evicted before it."
    )


def test_the_terminal_tells_probes_from_requests_and_one_from_many() -> None:
    said = {"hit": 1, "pending": 0, "miss": 0, "local": 5, "external": 0, "fetched": 0}
    source = {"rank": 1, "penaltyLeft": 0, "bytes": 0, "failures": {}, "firstBytes": [0.01, 0.03]}
    shown = StringIO()
    console = Console(file=shown, width=160)
    console.print(
        screen({
            "node": {"id": "n", "version": "1", "environment": "test"}, "components": [], "processes": [],
            "totals": {"hour": said, "day": {**said, "hit": 2}}, "at": 0.0, "downloads": [],
            "volume": {"limit": 10, "used": 5, "reserved": 0, "objects": 1, "removed": []},
            "queue": {"downloads": 0, "waiting": 0},
            "sources": [{**source, "name": "a:80", "requests": 0}, {**source, "name": "b:80", "requests": 3}],
        })
    )  # fmt: skip
    lines = shown.getvalue().splitlines()
    assert any("1 of 1 request from disk" in line for line in lines)
    assert any("2 of 2 requests from disk" in line for line in lines)
    assert any("5 B in 1 object, " in line for line in lines)
    (probed,) = [line for line in lines if "a:80" in line]
    (asked,) = [line for line in lines if "b:80" in line]
    assert "20 ms, of probes" in probed
    assert "20 ms" in asked
    assert "probes" not in asked
