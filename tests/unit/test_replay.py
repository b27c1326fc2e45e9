"""`distributor replay`: lines of logs, sizes, samples, and the whole command."""

from __future__ import annotations

import bz2
import dataclasses
import gzip
import json
import lzma
import re
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from benchmarks.traces import Parameters, Trace
from distributor_node.services.command_line.main import app
from distributor_node.services.replay.access_logs import (
    Elsewhere,
    Unreadable,
    asset_under,
    parse_line,
    read_logs,
    read_sizes,
)
from distributor_node.services.replay.recording import LogLine, Recording
from distributor_node.services.replay.run import ReplayRequest, recommend, replay
from distributor_node.services.replay.scenarios import (
    CacheSize,
    Result,
    Setting,
    parse_cache_sizes,
    settings_to_try,
    try_setting,
)
from distributor_node.shared.domain.errors import ConfigurationError
from distributor_node.shared.domain.eviction import AUTO_COST, MissCost
from distributor_node.shared.domain.eviction.simulator import Outcome, Rules
from distributor_node.shared.domain.objects import ObjectId
from distributor_node.shared.domain.space import footprint

AT = 1_764_000_000.0
OURS = {
    "event": "request_answered", "timestamp": "2025-11-24T16:00:02.500000Z", "level": "info", "method": "GET",
    "path": "/api/v1/assets/<id>", "object_id": "42", "status": 200, "bytes": 1000, "duration_ms": 2500.0,
    "x_cache": "hit", "source": "local", "cut": None,
}  # fmt: skip
CADDY = {
    "level": "info", "ts": AT + 0.5, "logger": "http.log.access", "status": 206, "size": 100, "duration": 0.5,
    "request": {"method": "GET", "uri": "/distributor/api/v1/assets/42?x=1", "headers": {"Range": ["bytes=0-99"]}},
    "resp_headers": {"Content-Range": ["bytes 0-99/5000"], "X-Cache": ["miss"]},
}  # fmt: skip
COMBINED = (
    '1.2.3.4 - - [24/Nov/2025:16:00:00 +0000] "GET /api/v1/assets/42 HTTP/1.1" 200 1000 "-" "Mozilla/5.0 [x]"'
)


def ours(**changes: object) -> str:
    return json.dumps({**OURS, **changes})


@pytest.mark.parametrize(
    ("line", "meaning"),
    [
        (ours(), LogLine(AT, ObjectId("42"), 1000, whole=True, cache="hit", first=0)),
        (ours(status=206, bytes=7), LogLine(AT, ObjectId("42"), 7, cache="hit")),
        (ours(status=206, bytes=7, range_start=50), LogLine(AT, ObjectId("42"), 7, cache="hit", first=50)),
        (ours(cut="client_gone"), LogLine(AT, ObjectId("42"), 1000, cache="hit", first=0)),
        (ours(size=9999), LogLine(AT, ObjectId("42"), 1000, size=9999, whole=True, cache="hit", first=0)),
        (json.dumps(CADDY), LogLine(AT, ObjectId("42"), 100, size=5000, cache="miss", first=0)),
        (json.dumps(CADDY).replace("0-99/", "300-399/"),
         LogLine(AT, ObjectId("42"), 100, size=5000, cache="miss", first=300)),
        (COMBINED, LogLine(AT, ObjectId("42"), 1000, whole=True, first=0)),
        (COMBINED.replace("16:00:00 +0000", "18:00:00 +0200"),
         LogLine(AT, ObjectId("42"), 1000, whole=True, first=0)),
        (COMBINED.replace(" 200 1000", " 206 17"), LogLine(AT, ObjectId("42"), 17)),
        (COMBINED.replace(" 200 1000", " 304 -"), LogLine(AT, ObjectId("42"), 0, not_modified=True)),
        (f"{AT},42,1000", LogLine(AT, ObjectId("42"), 1000, size=1000, first=0)),
        (f"{AT},42,1000,10", LogLine(AT, ObjectId("42"), 10, size=1000)),
        ("2025-11-24T16:00:00Z, 42, 1000", LogLine(AT, ObjectId("42"), 1000, size=1000, first=0)),
    ],
)  # fmt: skip
def test_lines_of_every_format(line: str, meaning: LogLine) -> None:
    assert parse_line(line + "\n") == meaning


def test_objects_that_are_named_by_paths() -> None:
    found = parse_line(COMBINED.replace("assets/42", "assets/films/my%20film.mp4?x=1") + "\n")
    assert found is not None
    assert found.object_id == ObjectId.parse_path("films/my%20film.mp4")


@pytest.mark.parametrize(
    "line",
    [
        "",
        "time,id,size",
        ours(method="HEAD"),
        ours(status=404),
        ours(object_id=None, path="/api/v1/status"),
        json.dumps({"event": "job_done", "level": "info"}),
        COMBINED.replace("GET", "HEAD"),
        COMBINED.replace("/assets/42", "/assets/..%2f42"),
    ],
)
def test_lines_about_something_else(line: str) -> None:
    assert parse_line(line) is None


ELSEWHERE = "/media/films/my%20film.mp4"


@pytest.mark.parametrize("line", [COMBINED, json.dumps(CADDY)])
def test_a_response_at_another_path_says_what_was_expected(line: str) -> None:
    elsewhere = line.replace("/distributor/api", "/api").replace("/api/v1/assets/42", ELSEWHERE)
    with pytest.raises(Elsewhere, match=re.escape(f"path: expected /assets/ID, got {ELSEWHERE[:20]!r}"[:-1])):
        parse_line(elsewhere)
    film = ObjectId.parse_path("films/my%20film.mp4")
    for prefix in ("/media", "/media/"):
        found = parse_line(elsewhere, asset=asset_under(prefix))
        assert found is not None
        assert found.object_id == film
        absolute = parse_line(
            elsewhere.replace(ELSEWHERE, f"http://host{ELSEWHERE}"), asset=asset_under(prefix)
        )
        assert absolute == found
        with pytest.raises(Elsewhere, match="expected one below --path-prefix, got '/"):
            parse_line(elsewhere.replace(ELSEWHERE, f"/other{ELSEWHERE}"), asset=asset_under(prefix))
    whole = parse_line(elsewhere, asset=asset_under("/"))
    assert whole is not None
    assert whole.object_id == ObjectId.parse_path("media/films/my%20film.mp4")


@pytest.mark.parametrize("prefix", ["", "media/"])
def test_a_path_prefix_begins_with_a_slash(prefix: str) -> None:
    with pytest.raises(ConfigurationError, match=f"path-prefix: expected .* /media/, got '{prefix}'"):
        asset_under(prefix)


def test_a_log_of_other_paths_is_refused_by_the_first_line_and_read_with_their_prefix(tmp_path: Path) -> None:
    log = tmp_path / "access.log"
    lines = [COMBINED.replace("GET /api/v1/assets/42", method) for method in ("POST /x", f"GET {ELSEWHERE}")]
    log.write_text("\n".join([lines[0], *lines[1:] * 2, "garbage"]))
    request = ReplayRequest([log], ["1M"], [Setting("lru")])
    with pytest.raises(ConfigurationError) as refused:
        replay(request, Console(quiet=True))
    said = str(refused.value)
    assert f"2 responses at other paths, the first: {log}: line 2: path: expected /assets/ID, got" in said
    assert "--path-prefix /" in said
    assert f"{log}: line 4: " in said
    shown = replay(dataclasses.replace(request, path_prefix="/media/"), Console(quiet=True))
    assert "2 requests for 1 object" in shown
    assert "other paths" not in shown
    log.write_text("\n".join([COMBINED, *lines[1:] * 2]))
    assert "2 responses at other paths" in replay(request, Console(quiet=True))


@pytest.mark.parametrize(
    "line",
    [
        *(
            "hello",
            "{",
            "{}x",
            '{"ts": 1, "request": 5}',
            "a,b,c",
            f"{AT},42,-1",
            "nan,42,1",
            ours(bytes="x"),
        ),
        *(f"{AT},42,{2**63}", f"{AT},42,10,-1", f"{AT},42,10,{2**63}", f"{AT},42,{'9' * 30}"),
        *(ours(status=206, range_start=-1), ours(status=206, range_start=2**63 - 1, bytes=1)),
        *(ours(size=2**63), ours(size=-1), ours(bytes=-1), COMBINED.replace(" 200 1000", f" 206 {2**64}")),
    ],
)
def test_unreadable_lines(line: str) -> None:
    with pytest.raises(Unreadable):
        parse_line(line)


@given(st.text())
def test_no_line_is_too_strange(line: str) -> None:
    with suppress(Unreadable):
        parse_line(line)


@given(st.integers(), st.integers(), st.sampled_from([f"{AT},42,%d,%d", ours(size=-2, bytes=-3)]))
def test_whatever_was_read_can_be_recorded(size: int, sent: int, shape: str) -> None:
    recording = Recording()
    line = shape % (size, sent) if "%" in shape else shape.replace("-2", str(size)).replace("-3", str(sent))
    with suppress(Unreadable):
        parsed = parse_line(line)
        assert parsed is not None
        recording.add(parsed)
    assert all(request.size >= 0 and request.sent >= 0 for request in recording.requests())


def test_a_size_too_large_for_any_disk_is_one_unreadable_line(tmp_path: Path) -> None:
    log = tmp_path / "access.csv"
    log.write_text(f"{AT},1,1000\n{AT + 1},2,{2**63}\n{AT + 2},3,1000,-5\n{AT + 3},1,1000\n")
    done = CliRunner().invoke(app, ["replay", str(log), "--size", "1M"])
    assert done.exit_code == 0, done.output
    assert "2 requests for 1 object (" in done.output
    assert "2 are unreadable" in done.output


records = st.lists(
    st.tuples(
        st.integers(0, 2**32 - 1),
        st.integers(0, 2**64 - 1),
        st.integers(0, 2**32 - 1),
        st.one_of(st.just(-1), st.integers(0, 2**63 - 1)),
    ),
    min_size=1,
    max_size=50,
)
PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "plain": bytes,
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
}


def recorded(name: str, content: bytes) -> list[tuple[float, str, int, int]]:
    with TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        recording = Recording()
        counts = read_logs([path], recording, 1.0, lambda _: None)
    assert not counts.unreadable, counts.first_unreadable
    return [(request.at, request.object_id, request.size, request.sent) for request in recording.requests()]


@settings(deadline=None)
@given(
    trace=records, packed=st.sampled_from(sorted(PACKERS)), kind=st.sampled_from(["oracle", "csv", "spaces"])
)
def test_public_traces_come_back_as_they_were_written(
    trace: list[tuple[int, int, int, int]], packed: str, kind: str
) -> None:
    trace.sort(key=lambda record: record[0])
    sizes = {key: max(size for _, other, size, _ in trace if other == key) for _, key, _, _ in trace}
    if kind == "oracle":
        content = b"".join(struct.pack("<IQIq", *record) for record in trace)
    elif kind == "csv":
        lines = [f"{key},{following},{at},{size}" for at, key, size, following in trace]
        content = "\n".join(["# obj_id,next_access_vtime,timestamp,obj_size", *lines]).encode()
    else:
        content = "\n".join(f"{at} {key} {size} {at % 7}" for at, key, size, _ in trace).encode()
    name = "w1.oracleGeneral.bin" if kind == "oracle" else "trace.tr"
    assert recorded(name, PACKERS[packed](content)) == [
        (float(at), str(key), sizes[key], size) for at, key, size, _ in trace
    ]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (struct.pack("<IQIq", 1, 2, 3, -1)[:-5], "record 3: expected 24 bytes, got 19"),
        (struct.pack("<IQIq", 1, 2, 3, -99), "record 3: next_access_vtime: expected -2 or more, got -99"),
    ],
)
def test_a_damaged_record_of_a_binary_trace_is_named(tmp_path: Path, damage: bytes, reason: str) -> None:
    trace = tmp_path / "w1.oracleGeneral"
    trace.write_bytes(struct.pack("<IQIq", 1, 2, 3, -1) * 2 + damage)
    with pytest.raises(ConfigurationError, match=rf"w1\.oracleGeneral: {reason}"):
        read_logs([trace], Recording(), 1.0, lambda _: None)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("noon 7 100", "time: expected a number or ISO 8601, got 'noon'"),
        ("5 7 many", "size: expected a number of bytes, got 'many'"),
        ("5 7", "expected 3 columns, got 2"),
        ("5,7,100,-3", "sent: expected a number of bytes, got '-3'"),
    ],
)
def test_the_first_unreadable_line_is_reported_with_its_field(tmp_path: Path, line: str, reason: str) -> None:
    trace = tmp_path / "trace.tr"
    trace.write_text(f"1 7 100\n{line}\n6 7 x\n")
    done = CliRunner().invoke(app, ["replay", str(trace), "--size", "1M"])
    assert done.exit_code == 0, done.output
    assert "2 are unreadable" in done.output
    assert f"trace.tr: line 2: {reason}" in done.output


def test_zstd_is_named(tmp_path: Path) -> None:
    trace = tmp_path / "w1.oracleGeneral.zst"
    trace.write_bytes(b"\x28\xb5\x2f\xfd\x00\x00")
    with pytest.raises(ConfigurationError, match=r"zst: expected .* file, got zstd"):
        read_logs([trace], Recording(), 1.0, lambda _: None)


@pytest.mark.parametrize("damage", ["cut", "overwritten"])
def test_a_damaged_gzip_file_is_named(tmp_path: Path, damage: str) -> None:
    packed = bytearray(gzip.compress(("\n".join(f"{AT},{n},{n * 7919}" for n in range(5000))).encode()))
    if damage == "cut":
        del packed[len(packed) // 2 :]
    else:
        packed[len(packed) // 2 : len(packed) // 2 + 200] = b"\xff" * 200
    log = tmp_path / "access.gz"
    log.write_bytes(packed)
    with pytest.raises(ConfigurationError, match=r"access\.gz: cannot be read"):
        read_logs([log], Recording(), 1.0, lambda _: None)


def test_sizes_come_from_the_most_reliable_field() -> None:
    recording = Recording({"manifest": 7})
    for line in (
        LogLine(3.0, ObjectId("named"), 10, size=500),
        LogLine(2.0, ObjectId("whole"), 300, whole=True),
        LogLine(1.0, ObjectId("whole"), 100),
        LogLine(4.0, ObjectId("part"), 100),
        LogLine(5.0, ObjectId("part"), 50),
        LogLine(6.0, ObjectId("manifest"), 3),
    ):
        recording.add(line)
    assert [(request.object_id, request.size, request.sent) for request in recording.requests()] == [
        ("whole", 300, 100), ("whole", 300, 300), ("named", 500, 10), ("part", 100, 100), ("part", 100, 50),
        ("manifest", 7, 3),
    ]  # fmt: skip
    assert recording.guessed_sizes == 1
    assert recording.logged_hit_ratio is None


def test_waiting_clients_per_fetch() -> None:
    recording = Recording()
    told = (
        (0.0, "miss"), (1.0, "pending"), (2.0, "hit"),
        (100.0, "pending"), (100.1, "miss"), (100.2, "pending"),  # they came together, and the second began the fetch
        (500.0, "miss"), (500.5, "pending"), (501.0, "pending"),
    )  # fmt: skip
    for at, cache in told:
        recording.add(LogLine(at, ObjectId("1"), 10, size=10, cache=cache))
    assert [request.joined for request in recording.requests()] == [
        None, 0.0, None, 100.0, 100.0, 100.0, None, 500.0, 500.0,
    ]  # fmt: skip
    assert recording.logged_hit_ratio == 1 / 9


def test_a_pending_request_after_a_pause_has_joined_no_fetch_of_before() -> None:
    recording = Recording()
    for at, cache in (
        (0.0, "miss"),
        (200.0, "pending"),
        (400.0, "pending"),
        (700.0, "pending"),
        (701.0, "pending"),
    ):
        recording.add(LogLine(at, ObjectId("1"), 10, size=100, cache=cache))
    assert [request.joined for request in recording.requests()] == [None, 0.0, 0.0, 700.0, 700.0]


def test_a_304_for_a_miss_starts_no_fetch() -> None:
    recording = Recording()
    for at, cache, unchanged in ((0.0, "miss", False), (5.0, "miss", True), (6.0, "pending", False)):
        recording.add(LogLine(at, ObjectId("1"), 0, size=10, cache=cache, not_modified=unchanged))
    assert [(request.joined, request.not_modified) for request in recording.requests()] == [
        (None, False), (None, True), (0.0, False),
    ]  # fmt: skip


def test_the_nodes_own_settings_are_simulated_too(tmp_path: Path) -> None:
    log, config = tmp_path / "access.json", tmp_path / "node.yaml"
    log.write_text(
        "\n".join(f"{AT + number},{number % 7},1000000" for number in range(700)), encoding="utf-8"
    )
    config.write_text(
        "storage: {path: data, limit: 5M, max_cached_item: 500K}\nevictor: {policy: lru, min_idle: 1}\n"
        "catalog: {manifest: objects.yaml}\n",
        encoding="utf-8",
    )
    options = ["--config", str(config), "--size", "1G", "--policy", "lru-sp"]
    done = CliRunner().invoke(app, ["replay", str(log), *options])
    assert done.exit_code == 0, done.output
    assert (
        "As configured (lru, second view above auto, window 8M, 5M): 0.0% of requests and 0.0% of bytes are hits"
        in done.output
    )
    assert "| 1G | lru-sp | 0.000 |" in done.output, "nor does a larger cache take what is too large"
    config.write_text(config.read_text().replace(", max_cached_item: 500K", ""))
    done = CliRunner().invoke(app, ["replay", str(log), *options])
    assert "| 1G | lru-sp | 0.990 |" in done.output


def test_files_plain_and_gzip_torn_and_sampled(tmp_path: Path) -> None:
    lines = [f"{AT + number},object-{number % 500},1000" for number in range(2000)] + [
        "rubbish",
        "time,id,size",
    ]
    plain, packed = tmp_path / "a.log", tmp_path / "b.log.gz"
    plain.write_text("\n".join(lines), encoding="utf-8")
    packed.write_bytes(gzip.compress("\n".join(lines).encode()))
    told: list[int] = []
    recording = Recording()
    counts = read_logs([plain, packed], recording, 1.0, told.append)
    assert (counts.counted, counts.other, counts.unreadable) == (4000, 2, 2)
    assert sum(told) == plain.stat().st_size + packed.stat().st_size
    sampled = Recording()
    read_logs([plain], sampled, 0.2, told.append)
    assert 60 < sampled.objects < 140
    assert len(sampled) == sampled.objects * 4, "all requests for an object, or none"
    packed.write_bytes(packed.read_bytes()[:-20])
    with pytest.raises(ConfigurationError, match="cannot be read"):
        read_logs([packed], Recording(), 1.0, told.append)


def test_sizes_of_a_manifest(tmp_path: Path) -> None:
    manifest = tmp_path / "manifest.yaml"
    manifest.write_text('version: 1\nobjects:\n  - {id: "42", size: 77}\n', encoding="utf-8")
    assert read_sizes(manifest) == {"42": 77}
    manifest.write_text("- 1", encoding="utf-8")
    with pytest.raises(ConfigurationError, match="expected a manifest"):
        read_sizes(manifest)


def test_cache_sizes_and_settings() -> None:
    assert [size.limit for size in parse_cache_sizes(["2G", "5%", "1%"], 10_000)] == [100, 500, 2 * 1024**3]
    with pytest.raises(ConfigurationError):
        parse_cache_sizes(["much"], 10_000)
    names = [
        setting.name
        for setting in settings_to_try(
            ["lru", "gdsf"], [AUTO_COST, MissCost(30.0), MissCost(fixed=2**26)], [2**23]
        )
    ]
    assert names == [
        "lru",
        "gdsf c0=auto",
        "gdsf c0=30x",
        "gdsf c0=64M",
        "gdsf c0=auto, second view above 8M",
    ]


def test_the_recommendation_prefers_fewer_bytes_from_sources_among_equals() -> None:
    def result(name: str, hits: int, from_sources: int) -> Result:
        outcome = Outcome(
            1000, hits, bytes_sent=1000, bytes_hit=1000 - from_sources, bytes_from_sources=from_sources
        )
        return Result(Setting(name), CacheSize(2**30, "1G"), outcome)

    sentence = recommend([result("lru", 500, 600), result("lru-sp", 900, 620), result("gdsf", 895, 500)])
    assert sentence.startswith("With 1G choose gdsf: 89.5% of requests")
    assert "(0.62 under lru-sp)" in sentence


@pytest.mark.parametrize("requests", [1, 999])
def test_nothing_is_concluded_from_few_requests(tmp_path: Path, requests: int) -> None:
    log = tmp_path / "access.csv"
    log.write_text("\n".join(f"{AT + number},{number % 30},100000" for number in range(requests)))
    done = CliRunner().invoke(app, ["replay", str(log), "--size", "1M"])
    assert done.exit_code == 0, done.output
    counted = "1 request is too few" if requests == 1 else "999 requests are too few"
    told = f"{counted} to choose a setting by: the rows may differ by chance. Expected at least 1000."
    assert done.output.splitlines()[-1] == told
    assert "points behind" not in done.output
    found = json.loads(CliRunner().invoke(app, ["replay", str(log), "--size", "1M", "--json"]).stdout)
    assert (found["recommendation"], found["gap"]) == (told, None)


def test_the_trace_is_what_its_parameters_say() -> None:
    trace = Trace(Parameters(views=60_000))
    assert 0.38 < trace.seen_once < 0.52
    assert list(trace.times) == sorted(trace.times)
    views, requests = list(trace.views()), list(trace.requests())
    assert len(views) == 60_000
    assert len(requests) > len(views)
    assert all(0 < request.sent <= request.size for request in requests)
    assert requests == sorted(requests)
    same = Trace(Parameters(views=60_000))
    assert list(same.objects) == list(trace.objects)


def test_a_sample_gives_nearly_the_same_as_everything() -> None:
    trace = Trace(Parameters(views=40_000))
    whole, sampled = Recording(), Recording()
    for request in trace.views():
        line = LogLine(request.at, request.object_id, request.sent, size=request.size)
        whole.add(line)
        if int(request.object_id) % 2:
            sampled.add(line)
    limit = whole.footprint // 10  # less is a single video
    setting = Setting("gdsf", AUTO_COST)
    everything = try_setting(whole.requests(), setting, Rules.of(limit), lambda _: None)
    half = try_setting(sampled.requests(), setting, Rules.of(limit // 2), lambda _: None)
    assert half.object_hit_ratio == pytest.approx(everything.object_hit_ratio, abs=0.03)


def test_the_whole_command(tmp_path: Path) -> None:
    log, picture = tmp_path / "access.json", tmp_path / "replay.svg"
    lines = [
        ours(
            object_id=str(number % 30),
            bytes=1000 * (1 + number % 30),
            x_cache="hit" if number > 30 else "miss",
        )
        for number in range(1200)
    ]
    log.write_text("\n".join(lines), encoding="utf-8")
    done = CliRunner().invoke(
        app,
        [
            "replay",
            str(log),
            "--size",
            "200%",
            "--size",
            "1M",
            "--picture",
            str(picture),
            "--compare",
            "sieve,arc",
        ],
    )
    assert done.exit_code == 0, done.output
    assert "1200 requests for 30 objects" in done.output
    assert "By the log's own account, 97.4% of requests were hits." in done.output
    assert "| 1M | gdsf c0=auto | 0.975 |" in done.output
    assert "| 1M | sieve | 0.975 |" in done.output
    assert (
        "gdsf c0=auto, second view above auto is 0.0 points behind the best object hit ratio (" in done.output
    )
    assert done.output.splitlines()[-1].startswith("With 200%") or done.output.splitlines()[-1].startswith(
        "With 1M"
    )
    assert ET.parse(picture).getroot().tag.endswith("svg")


def test_unknown_policies_to_compare_are_named(tmp_path: Path) -> None:
    log = tmp_path / "access.csv"
    log.write_text(f"{AT},1,1000\n")
    done = CliRunner().invoke(app, ["replay", str(log), "--compare", "sieve,clock"])
    assert isinstance(done.exception, ConfigurationError)
    assert "got clock" in str(done.exception)


@pytest.mark.parametrize(
    ("name", "reason"), [("replay.png", r"ends in \.svg"), ("no/replay.svg", "does not exist")]
)
def test_an_undrawable_chart_is_rejected_before_the_simulation(
    tmp_path: Path, name: str, reason: str
) -> None:
    log = tmp_path / "access.csv"
    log.write_text(f"{AT},1,1000\n")
    done = CliRunner().invoke(app, ["replay", str(log), "--picture", str(tmp_path / name)])
    assert isinstance(done.exception, ConfigurationError)
    with pytest.raises(ConfigurationError, match=reason):
        raise done.exception
    assert list(tmp_path.iterdir()) == [log]


def test_logs_without_objects_are_refused(tmp_path: Path) -> None:
    log = tmp_path / "empty.log"
    log.write_text("nothing here\n", encoding="utf-8")
    done = CliRunner().invoke(app, ["replay", str(log)])
    assert isinstance(done.exception, ConfigurationError)
    assert "got none in 1 line: 1 is unreadable. The first unreadable line: " in str(done.exception)
    log.write_text("")
    with pytest.raises(
        ConfigurationError, match=f"expected responses with objects, got an empty file: {log}"
    ):
        raise CliRunner().invoke(app, ["replay", str(log)]).exception or AssertionError


def test_small_logs_are_told_in_units_that_fit(tmp_path: Path) -> None:
    log = tmp_path / "access.csv"
    log.write_text(f"time,id,size\n{AT},1,1000\n{AT + 90},2,5000\nx\ny\n")
    told = (
        CliRunner().invoke(app, ["replay", str(log), "--size", "50%", "--policy", "lru"]).stdout.splitlines()
    )
    size = footprint(1000) + footprint(5000)
    assert told[0] == f"2 requests for 2 objects ({size / 1024:.1f} KiB) in 1.5 min."
    assert told[1] == "Of 5 lines, 1 is no response with an object and 2 are unreadable."
    (row,) = [line for line in told if "| lru |" in line]
    assert row.startswith(f"| 50% ({size / 2048:.1f} KiB) | lru | ")
    assert row.endswith(" | 1000 B | 0 |")
