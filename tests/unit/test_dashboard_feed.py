"""Rates, switches of sources, since when something is wrong, and one object in words."""

from __future__ import annotations

import time
from dataclasses import replace
from io import StringIO
from types import SimpleNamespace
from typing import Any, cast

import pytest
from rich.console import Console

from distributor_node.services.api.dashboard.feed import (
    MAX_DOWNLOADS,
    DownloadProgress,
    Feed,
    GrowthRates,
    ProblemTimes,
    is_far_ahead,
)
from distributor_node.services.api.operator.explain import in_words
from distributor_node.services.command_line.top import screen
from distributor_node.services.demo.objects import MIB
from distributor_node.shared.domain.extents import Extents
from distributor_node.shared.domain.objects import ObjectId, StoredRecord
from distributor_node.shared.domain.space import EvictionReason
from distributor_node.shared.ports.state_store import Fetch, FetchPhase
from distributor_node.shared.runtime.process_reports import ReportContent, ReportedProcess
from distributor_node.shared.settings.model import CatalogSettings, FetchSettings, Settings
from distributor_node.shared.settings.sizes import plural

KIB = 1024
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


def test_paused_downloads_that_are_not_listed_do_not_count_as_running() -> None:
    size = 100 * MIB
    fetches = [
        Fetch(ObjectId(f"{number}"), FetchPhase.FETCHING, size, "worker", None, 10, age=number)
        for number in range(MAX_DOWNLOADS + 5)
    ]
    partial = {fetch.object_id: (Extents.of((0, 8 * MIB)), False) for fetch in fetches}
    capacity = SimpleNamespace(running=0, free=1)
    context = SimpleNamespace(fetch_capacity=capacity, settings=SimpleNamespace(fetch=FetchSettings()))
    feed = Feed(cast("Any", context), cast("Any", None), cast("Any", None), cast("Any", None))
    feed._downloads_as_json(fetches, partial, 1)
    shown = feed._downloads_as_json(fetches, partial, 2)
    assert len(shown["downloads"]) == MAX_DOWNLOADS
    assert (shown["queue"]["downloads"], shown["queue"]["paused"]) == (0, MAX_DOWNLOADS + 5)


def test_the_partial_file_of_each_download_is_looked_at() -> None:
    """Also of more than are opened otherwise: without its extents a download without viewers counted as paused."""
    running = [
        Fetch(ObjectId(f"{number}"), FetchPhase.FETCHING, MIB, "worker", None, 10, age=number)
        for number in range(10 * MAX_DOWNLOADS + 5)
    ]
    parked = replace(running[0], object_id=ObjectId("parked"), phase=FetchPhase.PARKED)
    opened = list[ObjectId]()
    context = SimpleNamespace(volume=SimpleNamespace(open_partial=opened.append))
    feed = Feed(cast("Any", context), cast("Any", None), cast("Any", None), cast("Any", None))
    assert feed._partial_files([*running, parked]) == {}
    assert opened == [fetch.object_id for fetch in running]


def test_a_download_whose_id_is_a_digest_is_shown_with_its_path() -> None:
    object_id, path = ObjectId.parse_path("films/a.mp4"), "films/a.mp4"
    record = StoredRecord(object_id, MIB, None, None, None, 0, name=path)
    volume = SimpleNamespace(open_partial=lambda _: None, partial_record=lambda _: record)
    context = SimpleNamespace(
        volume=volume,
        fetch_capacity=SimpleNamespace(running=0, free=1),
        settings=SimpleNamespace(fetch=FetchSettings()),
    )
    feed = Feed(cast("Any", context), cast("Any", None), cast("Any", None), cast("Any", None))
    fetch = Fetch(object_id, FetchPhase.FETCHING, MIB, "worker", None, 10, age=1)
    [shown] = feed._downloads_as_json([fetch], feed._partial_files([fetch]), 1)["downloads"]
    assert (shown["id"], shown["path"]) == (object_id, path)
    feed._partial_files([])
    assert not feed._paths


@pytest.mark.parametrize(("age", "words"), [(0.0, "the last look-ups failed"), (99.0, "works")])
def test_lookups_that_fail_in_another_process_are_told(age: float, words: str) -> None:
    """Each process has its own look-ups, and one of them serves the page. What a dead one said counts no more."""
    settings = Settings(catalog=CatalogSettings(kind="origin", origin="http://localhost/{id}"))
    capacity = SimpleNamespace(workers_alive=1, running=0, free=1)
    context = SimpleNamespace(settings=settings, fetch_capacity=capacity)
    health = SimpleNamespace(check_port=lambda: None)
    feed = Feed(cast("Any", context), cast("Any", None), cast("Any", health), cast("Any", None))
    content = ReportContent(kind="api", host="host", process=2, started=1.0, interval=1.0, lookups_fail=True)
    feed._processes = [ReportedProcess("other", age, content)]
    found = {one["name"]: one["words"] for one in feed._components(store_replies=True, now=9)}
    assert found["Catalog (origin)"] == words


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
        otherwise = "Otherwise it would be the next to be evicted."
        assert in_words(nearly, None, None)[1:] == ["It is being sent, so it is not evicted now.", otherwise]
        read = nearly | {"sending": False}
        recent = "It was read less than 2 min ago (evictor.min_idle), so it is not evicted now."
        assert in_words(read, None, None, min_idle=120)[1:] == [recent, otherwise]
        idle = read | {"lastAccess": time.time() - 121}
        assert in_words(idle, None, None, min_idle=120)[1:] == ["It would be the next to be evicted."]

    def test_what_is_being_removed_is_not_said_to_stay(self) -> None:
        [sentence] = in_words(explained(state="leaving", sending=True), None, None)
        assert sentence.startswith("It is being removed")

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


class TestFarAhead:
    """In KiB."""

    FETCH = FetchSettings(window_above=200 * KIB, window=64 * KIB)

    @pytest.mark.parametrize(
        ("extents", "positions", "ahead"),
        [
            ([(0, 94)], [30], True),
            ([(0, 94)], [31], False),
            ([(0, 94)], [], True),  # they have left
            ([(0, 94), (340, 400)], [30, 350], True),  # the second one has the end
            ([(0, 94)], [30, 220], False),
            ([(0, 400)], [30], False),  # it is complete, and is being verified
        ],
    )
    def test_of_its_viewers(self, extents: list[tuple[int, int]], positions: list[int], ahead: bool) -> None:
        on_disk = Extents.of(*((first * KIB, end * KIB) for first, end in extents))
        assert is_far_ahead(400 * KIB, on_disk, [place * KIB for place in positions], self.FETCH) is ahead

    def test_an_object_without_a_window_is_not(self) -> None:
        extents, windowless = Extents.of((0, 94 * KIB)), FetchSettings(window_above=100, window=None)
        assert not is_far_ahead(200 * KIB, extents, [10], self.FETCH)
        assert not is_far_ahead(400 * KIB, extents, [10], windowless)


SAID = {"hit": 1, "pending": 0, "miss": 0, "local": 5, "external": 0, "fetched": 0}
SOURCE = {
    "rank": 1, "penaltyLeft": 0, "bytes": 0, "failures": {}, "firstBytes": [0.01, 0.03], "name": "a:80", "requests": 3,
}  # fmt: skip
SNAPSHOT = {
    "node": {"id": "n", "version": "1", "environment": "test"}, "components": [], "processes": [],
    "totals": {"hour": SAID, "day": {**SAID, "hit": 2}}, "at": 0.0, "downloads": [],
    "volume": {"limit": 10, "used": 5, "reserved": 0, "objects": 1, "removed": []},
    "queue": {"downloads": 0, "waiting": 0}, "sources": [],
}  # fmt: skip


def test_removed_objects_are_shown_by_their_paths() -> None:
    removed = [
        {
            "id": "sha256-00",
            "path": "films/a.mp4",
            "at": 0.0,
            "bytes": 5,
            "words": "purged",
            "reason": "purged",
        },
        {"id": "plain", "at": 0.0, "bytes": 5, "words": "purged", "reason": "purged"},
    ]
    shown = "".join(
        shown_lines(100, volume={"limit": 10, "used": 5, "reserved": 0, "objects": 1, "removed": removed})
    )
    assert "films/a.mp4" in shown
    assert "plain" in shown
    assert "sha256-00" not in shown


def shown_lines(width: int, **changes: Any) -> list[str]:
    shown = StringIO()
    console = Console(file=shown, width=width)
    console.print(screen({**SNAPSHOT, **changes}, width))
    return [line.rstrip() for line in shown.getvalue().splitlines()]


def test_the_terminal_tells_probes_from_requests_and_one_from_many() -> None:
    lines = shown_lines(160, sources=[{**SOURCE, "requests": 0}, {**SOURCE, "name": "b:80"}])
    assert any("1 of 1 request from disk" in line for line in lines)
    assert any("2 of 2 requests from disk" in line for line in lines)
    assert any("5 B in 1 object, " in line for line in lines)
    (probed,) = [line for line in lines if "a:80" in line]
    (asked,) = [line for line in lines if "b:80" in line]
    assert "20 ms, of probes" in probed
    assert "20 ms" in asked
    assert "probes" not in asked


def download(object_id: str, **changes: Any) -> dict[str, Any]:
    return {
        "id": object_id, "phase": "fetching", "paused": False, "size": 120 * MIB, "extents": [[0, 48 * MIB]],
        "source": "storage-7.example.org:443", "sources": ["storage-3.example.org:443", "storage-7.example.org:443"],
        "rate": 896_512, "secondsLeft": 88.0, "viewers": [{"key": "a", "at": 16 * MIB}], "moreViewers": 0,
    } | changes  # fmt: skip


BUSY = {
    "downloads": [
        download("2801"),
        download("2802", paused=True, rate=0),
        download("2803", phase="parked", rate=0),
        download("films/a-long-title-of-a-film-with-many-words.mp4", rate=0),
    ],
    "queue": {
        "downloads": 2, "paused": 1, "waiting": 1, "next": [{"id": "2804", "age": 12.0, "viewers": 2}],
    },
    "sources": [{**SOURCE, "name": "storage-7.example.org:443", "failures": {"timeout": 12, "corrupt": 3}}],
}  # fmt: skip


def test_the_terminal_shows_the_path_of_a_download_whose_id_is_a_digest() -> None:
    one = download(ObjectId.parse_path("films/a.mp4"), path="films/a.mp4")
    lines = shown_lines(120, **{**BUSY, "downloads": [one]})
    assert any(line.startswith(" films/a.mp4 ") for line in lines)


@pytest.mark.parametrize("width", [80, 100, 120])
def test_the_tables_fit_into_the_terminal(width: int) -> None:
    lines = shown_lines(width, **BUSY)
    assert all(len(line) <= width for line in lines)
    (heading,) = [line.split() for line in lines if "progress" in line]
    (running,) = [line for line in lines if line.startswith(" 2801 ")]
    # What says most is not cut, and each download has one line.
    assert "875.5 KiB/s" in running
    assert "120.0 MiB" in running
    assert "88 s" in running
    assert ("source" in heading) == (width >= 100)
    assert any(line.startswith(" films/a-") for line in lines)
    (source,) = [line for line in lines if "answers" in line]
    assert "storage-7.example.org:443" in source
    assert source.endswith(" 12 timeout, 3 corrupt" if width >= 120 else " 15") or width == 100


def test_the_terminal_tells_downloads_that_wait_from_those_that_run() -> None:
    lines = shown_lines(80, **BUSY)
    assert "2 running, 1 paused, 1 waiting" in " ".join(lines)
    words = {line.split()[0]: line for line in lines if line.startswith(" 280")}
    assert "paused" in words["2802"]
    assert "interrupted" in words["2803"]
    assert "waiting 12 s" in words["2804"]
    assert not any("B/s" in words[one] for one in ("2802", "2803", "2804"))
    (stalled,) = [line for line in lines if "films/" in line]
    assert "0 B/s" in stalled
