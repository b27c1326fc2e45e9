"""Windows in a replay: which bytes are fetched, what the report says of it, and a textbook version of the model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from distributor_node.services.command_line.main import app
from distributor_node.services.replay.recording import LogLine, Recording
from distributor_node.services.replay.run import OwnNode, ReplayRequest, replay
from distributor_node.services.replay.scenarios import NodeRules, Setting
from distributor_node.shared.domain.errors import ConfigurationError
from distributor_node.shared.domain.eviction import Lru
from distributor_node.shared.domain.eviction.simulator import Outcome, Request, Rules, Simulation, WindowRules
from distributor_node.shared.domain.objects import ObjectId
from distributor_node.shared.domain.space import VIEW_WINDOW, Watermarks, footprint
from distributor_node.shared.settings.sizes import size_in_words

AT = 1_764_000_000.0
MIB, GIB = 1024**2, 1024**3
FILM, SONG = ObjectId("film"), ObjectId("song")


def line(
    seconds: float, object_id: str, size: int, sent: int, start: int | None = None, **more: object
) -> str:
    """One line of the node's own log."""
    return json.dumps({
        "event": "request_answered", "timestamp": AT + seconds, "method": "GET", "object_id": object_id,
        "status": 206 if start is not None else 200, "bytes": sent, "size": size, "range_start": start, **more,
    })  # fmt: skip


# Two films of 10 GiB. A viewer gets the first GiB of one but for 8 MiB, in two ranges; another one gets half of that at
# the same time. A window of 8 MiB fetches exactly 1 GiB for the first, and nothing for the other. Of the second film
# 9 GiB are watched, so it is completed. A song of 1 MiB is heard twice. The second range is longer than the window, so
# with one it is no hit.
WATCHED = GIB - 8 * MIB
SMALL_LOG = [
    line(0, "film", 10 * GIB, WATCHED - 100 * MIB, 0),
    line(100, "film", 10 * GIB, 100 * MIB, WATCHED - 100 * MIB),
    line(200, "song", MIB, MIB),
    line(250, "film", 10 * GIB, WATCHED // 2, 0),
    line(1000, "film-2", 10 * GIB, 9 * GIB, 0),
    line(2000, "song", MIB, MIB),
]


def run(log: Path, *options: str) -> str:
    done = CliRunner().invoke(app, ["replay", str(log), "--policy", "lru", "--size", "40G", *options])
    if done.exception is not None:
        raise done.exception
    return done.stdout


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "access.json"
    path.write_text("\n".join(SMALL_LOG), encoding="utf-8")
    return path


def test_the_report_says_what_a_window_saves_and_costs(log: Path) -> None:
    told = run(log)
    # Whole: 20 GiB and 1 MiB from sources, 3 hits. Window: 11 GiB and 1 MiB, 2 hits, 100 of 10,742 MiB less.
    assert "| 40G | lru | 0.500 |" in told
    assert "| 40G | lru, window 8M | 0.333 |" in told
    assert (
        "3 views of objects above 16M got 35.0% of the object in the mean and 9.9% in the median; 0.0% got"
        in told
    )
    assert (
        "With lru, 40G, a window would save 45.0% (9.0 GiB) of the bytes from sources and 45.0% (9.0 GiB) of the"
        " bytes written; object hits -16.7 points, byte hits -0.9 points." in told
    )


def test_json_has_the_same_figures(log: Path) -> None:
    told = json.loads(run(log, "--json"))
    assert (told["requests"], told["objects"], told["watched"]["views"]) == (6, 3, 3)
    (whole,), (windowed,) = told["results"], told["windowed"]
    assert (whole["setting"], windowed["setting"]) == ("lru", "lru, window 8M")
    assert (whole["bytes_from_sources"], whole["bytes_written"]) == (20 * GIB + MIB, 20 * GIB + MIB)
    assert (windowed["bytes_from_sources"], windowed["bytes_written"]) == (11 * GIB + MIB, 11 * GIB + MIB)
    assert windowed["source_bytes_saved"] == windowed["written_bytes_saved"] == 9 * GIB
    assert (whole["hits"], windowed["hits"]) == (3, 2)
    assert windowed["object_hits_gained"] == pytest.approx(-1 / 6)
    assert (whole["completed"], windowed["completed"]) == (0, 1)
    assert whole["bytes_sent"] == 2 * MIB + WATCHED + WATCHED // 2 + 9 * GIB


def test_a_window_can_be_chosen_left_out_and_without_effect(log: Path) -> None:
    narrow = json.loads(run(log, "--json", "--window", "1M", "--window-above", "1G"))
    assert narrow["window"]["ahead"] == MIB
    assert narrow["windowed"][0]["bytes_from_sources"] == WATCHED + 10 * GIB + 2 * MIB
    assert "window" not in run(log, "--window", "off")
    assert "No object is larger than 40G: a window would change nothing." in run(log, "--window-above", "40G")
    with pytest.raises(ConfigurationError, match="window-above: expected a number and a unit"):
        run(log, "--window-above", "large")


def test_the_nodes_own_settings_are_tried_with_a_window_too(log: Path, tmp_path: Path) -> None:
    config = tmp_path / "node.yaml"
    config.write_text(
        "storage: {path: data, limit: 50G}\nevictor: {policy: lru}\nadmission: {above_size: off}\n"
        "catalog: {manifest: objects.yaml}\n"
    )
    told = run(log, "--config", str(config))
    assert told.count("a window would save 45.0% (9.0 GiB) of the bytes from sources") == 2
    assert "With lru, 50G, a window would save" in told


def test_a_node_with_a_window_is_compared_with_one_without(log: Path) -> None:
    own = OwnNode(Setting("lru", window=WindowRules()), 50 * GIB, NodeRules())
    request = ReplayRequest([log], ["40G"], [Setting("lru")], own=own, window=WindowRules())
    told = replay(request, Console(quiet=True))
    assert "As configured (lru, window 8M, 50G): 33.3% of requests" in told
    assert "With lru, 50G, a window would save 45.0% (9.0 GiB) of the bytes from sources" in told
    assert told.count("| lru, window 8M |") == 1, "the table has the sizes that were asked for"


def test_one_of_a_kind_is_told_in_the_singular(tmp_path: Path) -> None:
    log = tmp_path / "access.log"
    told = '1.2.3.4 - - [24/Nov/2025:16:00:00 +0000] "GET /api/v1/assets/42 HTTP/1.1" 206 17'
    log.write_text(f"{told}\n{told.replace('assets/42', 'status')}\n", encoding="utf-8")
    lines = run(log).splitlines()
    assert lines[0] == f"1 request for 1 object ({size_in_words(footprint(17))}) in 0 s."
    assert lines[1] == "Of 2 lines, 1 is no response with an object."
    assert lines[2] == "1 object has only partial responses, so its size is a lower bound (see --sizes)."


# Where a response begins


def firsts(*lines: LogLine) -> list[int]:
    recording = Recording()
    for one in lines:
        recording.add(one)
    return [request.first for request in recording.requests()]


def part(at: float, sent: int, first: int | None = None, object_id: ObjectId = FILM) -> LogLine:
    return LogLine(at, object_id, sent, size=100, first=first)


def test_ranges_without_a_stated_start_go_on_where_the_last_one_ended() -> None:
    assert firsts(part(0, 10), part(1, 20), part(2, 5, object_id=SONG), part(3, 30)) == [0, 10, 0, 30]
    assert firsts(part(0, 10, 40), part(1, 20), part(2, 20, 0), part(3, 20)) == [40, 50, 0, 20]
    assert firsts(part(0, 90), part(1, 60)) == [0, 40], "never beyond the object's end"
    assert firsts(part(0, 10), part(VIEW_WINDOW, 10)) == [0, 0], "another view"
    assert firsts(part(0, 10), part(200, 10), part(400, 10)) == [0, 10, 20], "one view, as long as it goes on"
    assert firsts(part(0, 10), part(1, 0), part(2, 10)) == [0, 10, 10]


def test_shares_of_views() -> None:
    recording = Recording()
    for one in (
        part(0, 50, 0),
        part(10, 25, 50),
        part(15, 5, 95),  # the index at the film's end
        part(20, 10, 0),  # another view begins
        part(1000, 40, 60),  # and another, after a pause
        part(30, 100, 0, SONG),
        LogLine(40, ObjectId("icon"), 10, size=10, first=0),
    ):
        recording.add(one)
    assert list(recording.watched_shares(50)) == [0.1, 0.4, 0.8, 1.0]
    assert not recording.watched_shares(100)


# The model


def simulated(window: WindowRules | None, limit: int, *requests: Request) -> Outcome:
    rules = Rules(limit, Watermarks(low=limit, high=limit), 0.0)
    simulation = Simulation(Lru(), rules, None, window)
    for request in requests:
        simulation.process(request)
    return simulation.outcome


def asked(at: float, first: int, sent: int, size: int = 1000, object_id: ObjectId = FILM) -> Request:
    return Request(at, object_id, size, sent, first=first)


GROW = WindowRules(100, 200, watched_share=None, second_view_share=None)


def test_an_object_grows_with_its_furthest_viewer() -> None:
    told = simulated(GROW, 10**6, asked(0, 0, 50), asked(1, 50, 100), asked(2, 0, 20), asked(3, 150, 200))
    assert told.bytes_from_sources == told.bytes_written == 450
    assert told.hits == 2, "the second range lies in the window, and the last one beyond it"
    assert told.completed == 0


def test_bytes_at_the_end_do_not_fetch_what_is_between() -> None:
    told = simulated(GROW, 10**6, asked(0, 0, 50), asked(1, 990, 10), asked(2, 500, 10))
    assert told.bytes_from_sources == 150 + 10 + 110


def test_small_objects_are_fetched_as_a_whole() -> None:
    assert simulated(GROW, 10**6, asked(0, 0, 10, size=200)).bytes_from_sources == 200
    assert simulated(GROW, 10**6, asked(0, 0, 10, size=201)).bytes_from_sources == 110


def test_an_object_is_completed_once_a_viewer_has_passed_most_of_it() -> None:
    window = WindowRules(100, 200, watched_share=0.8, second_view_share=None)
    assert simulated(window, 10**6, asked(0, 0, 699), asked(1, 699, 100)).bytes_from_sources == 899
    told = simulated(window, 10**6, asked(0, 0, 699), asked(1, 699, 101), asked(3, 700, 300))
    assert (told.bytes_from_sources, told.completed, told.hits) == (1000, 1, 1)
    assert simulated(window, 10**6, asked(0, 951, 49)).bytes_from_sources == 49, "the index of an MP4"
    assert simulated(window, 10**6, asked(0, 950, 50)).bytes_from_sources == 1000, "a viewer who jumped there"


def test_a_second_view_completes_once_it_has_passed_a_fifth() -> None:
    window = WindowRules(100, 200, watched_share=None, second_view_share=0.2)
    before = [asked(0, 0, 150)]
    assert simulated(window, 10**6, *before, asked(VIEW_WINDOW, 0, 199)).bytes_from_sources == 299
    assert simulated(window, 10**6, *before, asked(VIEW_WINDOW, 0, 200)).bytes_from_sources == 1000
    again = [asked(VIEW_WINDOW, 0, 100), asked(VIEW_WINDOW + 1, 100, 100)]
    assert simulated(window, 10**6, *before, *again).bytes_from_sources == 1000, "in two ranges"


def test_going_on_jumping_and_joining_are_no_second_view() -> None:
    window = WindowRules(100, 200, watched_share=None, second_view_share=0.2)
    for goes_on in (asked(VIEW_WINDOW, 150, 100), asked(VIEW_WINDOW, 400, 100), asked(5, 0, 250)):
        end = goes_on.first + goes_on.sent + 100
        fetched = end if goes_on.first <= 250 else 250 + end - goes_on.first
        assert simulated(window, 10**6, asked(0, 0, 150), goes_on).bytes_from_sources == fetched


def test_room_is_made_for_the_whole_object_and_only_what_is_there_is_kept() -> None:
    limit = 3 * footprint(0) + 1300
    told = simulated(
        GROW, limit, asked(0, 0, 50), asked(1, 0, 200, 200, SONG), asked(2, 0, 50, 950, ObjectId("other"))
    )
    assert told.evicted == 0, "150 and 200 bytes are there, and 950 more have room"
    told = simulated(
        GROW, limit, asked(0, 0, 50), asked(1, 0, 200, 200, SONG), asked(2, 0, 50, 951, ObjectId("other"))
    )
    assert told.evicted == 1


class Textbook:
    """The model once more, byte by byte, with LRU: slow and plain."""

    def __init__(self, rules: Rules, window: WindowRules) -> None:
        self.rules, self.window, self.outcome = rules, window, Outcome()
        self.there: dict[ObjectId, set[int]] = {}  # least recently used first
        self.sizes: dict[ObjectId, int] = {}
        self.last: dict[ObjectId, float] = {}
        self.view_began: dict[ObjectId, float] = {}
        self.watched: dict[ObjectId, set[int]] = {}
        self.seen_again: set[ObjectId] = set()

    def process(self, request: Request) -> None:
        at, object_id, size, sent, _, _, first = request
        wanted = set(range(first, first + sent))
        self.outcome.requests += 1
        self.outcome.bytes_sent += sent
        begins = at - self.view_began.get(object_id, -1e9) >= VIEW_WINDOW
        if begins:
            self.view_began[object_id] = at
        there = self.there.get(object_id)
        if there is None:
            if footprint(size) > self.rules.limit or not self.make_room(footprint(size), at):
                self.outcome.proxied += 1
                self.outcome.bytes_from_sources += sent
                return
            there = self.there[object_id] = set()
            self.sizes[object_id], self.watched[object_id] = size, set()
            self.seen_again.discard(object_id)
        else:
            self.touch(object_id)
            if wanted <= there:
                self.outcome.hits += 1
                self.outcome.bytes_hit += sent
            if len(there) == size:
                self.last[object_id] = at
                return
            if begins and first in self.watched[object_id]:
                self.seen_again.add(object_id)
        self.last[object_id] = at
        more = self.to_fetch(object_id, first, sent, begins=begins)
        if not self.has_room(more, at, object_id, begins=begins):
            self.outcome.bytes_from_sources += len(wanted - there)
            return
        there |= more
        self.outcome.bytes_from_sources += len(more)
        self.outcome.bytes_written += len(more)
        self.watched[object_id] |= wanted
        self.outcome.completed += len(there) == size > self.window.above

    def to_fetch(self, object_id: ObjectId, first: int, sent: int, *, begins: bool) -> set[int]:
        size, there, window = self.sizes[object_id], self.there[object_id], self.window
        whole = set(range(size))
        ahead = set(range(first, min(size, first + sent + window.ahead)))
        shares = [window.watched_share]
        if object_id in self.seen_again:
            shares.append(window.second_view_share)
        places = [share * size for share in shares if share is not None]
        index = min(window.ahead, size // 20)
        passed = any(first < place <= first + sent or (first >= place and sent >= index) for place in places)
        return (whole if size <= window.above or passed else ahead) - there

    def has_room(self, more: set[int], at: float, object_id: ObjectId, *, begins: bool) -> bool:
        """Room for a new object was made before it is asked here, and none is there then."""
        there = self.there[object_id]
        if not there or (not more and not begins):
            return True
        needed = self.sizes[object_id] - len(there) if begins else len(more)
        return self.make_room(needed, at) and object_id in self.there

    def touch(self, object_id: ObjectId) -> None:
        self.there[object_id] = self.there.pop(object_id)

    @property
    def used(self) -> int:
        return sum(footprint(len(there)) for there in self.there.values())

    def make_room(self, asked: int, at: float) -> bool:
        idle = [one for one in self.there if at - self.last[one] >= self.rules.min_idle]
        least = self.used - sum(footprint(len(self.there[one])) for one in idle)
        needed = asked if least + asked <= self.rules.limit else 0  # nothing goes for what will not fit
        if self.used + needed > self.rules.watermarks.high:
            for one in idle:
                if self.used + needed <= min(self.rules.watermarks.low, self.rules.limit):
                    break
                del self.there[one]
                self.outcome.evicted += 1
        return self.used + asked <= self.rules.limit


SIZES = (3, 8, 37, 60)


@st.composite
def responses(draw: st.DrawFn) -> Request:
    number = draw(st.integers(0, len(SIZES) - 1))
    first = draw(st.integers(0, SIZES[number] - 1))
    sent = draw(st.integers(1, SIZES[number] - first))
    pause = draw(st.sampled_from([1.0, 10.0, VIEW_WINDOW - 1, VIEW_WINDOW, 5000.0]))
    return Request(pause, ObjectId(str(number)), SIZES[number], sent, first=first)


@settings(deadline=None, max_examples=500)
@given(
    asked_for=st.lists(responses(), max_size=40),
    window=st.builds(
        WindowRules,
        ahead=st.integers(0, 10),
        above=st.integers(2, 30),
        watched_share=st.sampled_from([None, 0.5, 0.8, 1.0]),
        second_view_share=st.sampled_from([None, 0.0, 0.2, 0.6]),
    ),
    room=st.integers(0, 120),
    objects=st.integers(1, 4),
    min_idle=st.sampled_from([0.0, 5.0, 400.0]),
)
def test_the_simulation_is_the_textbook_model(
    asked_for: Sequence[Request], window: WindowRules, room: int, objects: int, min_idle: float
) -> None:
    limit = objects * footprint(0) + room
    rules = Rules(limit, Watermarks(low=limit - room // 4, high=limit), min_idle)
    simulation, textbook = Simulation(Lru(), rules, None, window), Textbook(rules, window)
    at = AT
    for request in asked_for:
        at += request.at
        simulation.process(request._replace(at=at))
        textbook.process(request._replace(at=at))
        assert simulation.outcome == textbook.outcome
        assert simulation.used == textbook.used <= limit
