"""Output of the benchmarks: medians, ratios within rounds, tables, charts."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from benchmarks import history
from benchmarks.__main__ import options_of, parse
from benchmarks.accounting import cpu_ms_of
from benchmarks.cases import HIT_CASES, RANGE_BYTES, RequestKind, requests_for
from benchmarks.chart import bar_chart
from benchmarks.compare import check_out, row
from benchmarks.dataset import Group, fill_volume, groups, hash_of, record_of
from benchmarks.figures import Case, Measurement, medians, percentile, ratio, rotated
from benchmarks.machine import interpreter_speed, mitigations, python_build
from benchmarks.report import Report, case_table, number, write_results
from benchmarks.run import CASE_NAMES
from benchmarks.tracing import new_for_traced_misses
from distributor_node.shared.adapters.volume import Volume
from distributor_node.shared.domain.objects import ObjectId

CASE = Case("hit", "a hit", "requests_per_second", "ours")


def measured(contender: str, *figures: float) -> list[Measurement]:
    return [
        Measurement("hit", contender, index, {"requests_per_second": value})
        for index, value in enumerate(figures)
    ]


def test_ratios_are_taken_within_rounds() -> None:
    both = measured("ours", 10, 40, 90) + measured("nginx", 10, 20, 30)
    seen = ratio(both, CASE, "nginx")
    assert seen is not None
    assert (seen.median, seen.least, seen.greatest) == (2.0, 1.0, 3.0)
    assert medians(both, "ours") == {"requests_per_second": 40}


def test_no_round_together_no_ratio() -> None:
    assert ratio(measured("ours", 1), CASE, "nginx") is None


@pytest.mark.parametrize(("share", "expected"), [(0.0, 1), (0.5, 50), (0.99, 99), (1.0, 100)])
def test_percentiles_are_values_that_were_seen(share: float, expected: int) -> None:
    assert percentile(list(range(100, 0, -1)), share) == expected


@pytest.mark.parametrize(("value", "text"), [(1234567.0, "1,234,567"), (12.345, "12.3"), (0.61234, "0.612")])
def test_three_digits_count(value: float, text: str) -> None:
    assert number(value) == text


def test_a_table_has_a_row_for_each_contender() -> None:
    lines = case_table(CASE, measured("ours", 200, 400) + measured("nginx", 100, 100)).splitlines()
    assert lines[2:] == [
        "| | requests/s | ours ÷ this, requests/s |",
        "|---|---|---|",
        "| ours | 300 |  |",
        "| nginx | 100 | 3.00 (2.00–4.00) |",
    ]


def test_results_are_written_in_three_forms(tmp_path: Path) -> None:
    report = Report({"CPU": "one & only"})
    report.add(CASE, measured("ours", 2) + measured("nginx <static>", 1))
    files = {path.suffix: path.read_text() for path in write_results(report, tmp_path / "new", "bench")}
    assert "| ours | 2 |" in files[".md"]
    assert json.loads(files[".json"])["measurements"][1]["figures"] == {"requests_per_second": 1}
    ET.fromstring(files[".svg"])


def test_bars_are_cut_but_their_numbers_are_not() -> None:
    picture = bar_chart("t", [("case", [("a", 0.5), ("b", 50.0)])])
    widths = [
        float(each.attrib["width"])
        for each in ET.fromstring(picture).iter("{http://www.w3.org/2000/svg}rect")
    ]
    assert widths[2] < widths[0]
    assert ">50.00<" in picture


def test_ranges_lie_within_the_object() -> None:
    case = next(each for each in HIT_CASES if each.kind is RequestKind.RANGE)
    group = groups(quick=True, new={})[case.group]
    for spec in requests_for(case, group, "/assets/", {}):
        first, _, last = spec.header[1].removeprefix("bytes=").partition("-")
        assert int(last) - int(first) + 1 == RANGE_BYTES
        assert int(last) < group.size


def test_cpu_time_of_a_process_is_counted_in_less_than_a_tick() -> None:
    before, deadline = cpu_ms_of(os.getpid()), time.process_time() + 0.002
    while time.process_time() < deadline:
        pass
    assert cpu_ms_of(os.getpid()) - before > 0


def test_misses_are_compared_in_each_round() -> None:
    misses = [
        Measurement("miss-64m", name, number, {"total_ms": total, "api_cpu_ms": 10.0})
        for number, totals in enumerate([(80, 100), (90, 100), (70, 100)])
        for name, total in zip(("this", "base"), totals, strict=True)
    ]
    said = row("miss-64m", misses, {"total_ms": "total", "api_cpu_ms": "CPU of the API"})
    assert said == "miss-64m: total 0.80 (0.70 to 0.90) CPU of the API 1.00 (1.00 to 1.00)"


def test_cases_are_chosen_by_name() -> None:
    assert options_of(parse(["--case", "hit-64k", "--rounds", "3"])).cases == ["hit-64k"]
    assert options_of(parse([])).cases == CASE_NAMES
    with pytest.raises(SystemExit):
        parse(["--case", "no-such"])


@pytest.mark.parametrize("arguments", [[], ["--rounds", "9", "--samples", "3"], ["--quick"]])
def test_there_are_new_objects_for_all_that_ask_for_them(arguments: list[str]) -> None:
    options = options_of(parse(arguments))
    new = options.new_objects()
    assert new["new-64m"] == 3 * (options.samples + 1)
    assert new["new-64k"] == 3 * (options.samples + 1) + new_for_traced_misses(options.rounds)
    assert new["new-1m"] == 2 * options.rounds
    assert new["new-1g"] == (3 + 7) * options.fetch_rounds
    held = groups(options.quick, new)
    assert {name: held[name].count for name in new} == new
    ids = [object_id for group in held.values() for object_id in group.ids]
    assert len(set(ids)) == len(ids)


def test_only_what_chosen_cases_need_is_new() -> None:
    assert options_of(parse(["--case", "fetch", "--rounds", "2"])).new_objects() == {
        "new-64k": 0, "new-64m": 0, "new-1m": 0, "new-1g": 6,
    }  # fmt: skip


def test_each_contender_is_first_in_turn() -> None:
    assert [rotated("abc", number)[0] for number in range(-1, 4)] == ["c", "a", "b", "c", "a"]


def test_a_filled_volume_is_one_that_fetches_have_filled(tmp_path: Path) -> None:
    group = Group("some", 70_000, 3, 100)
    fill_volume(tmp_path / "volume", [group])
    volume = Volume(tmp_path / "volume")
    item = group.object("101")
    opened = volume.open_object(ObjectId("101"))
    assert opened is not None
    assert opened.record.content_hash == record_of(item).content_hash
    assert str(opened.record.content_hash) == hash_of(item)
    opened.close()
    assert [found for found in volume.scan_objects() if not hasattr(found, "object_id")] == []
    volume.close()


def test_groups_survive_the_command_line() -> None:
    for group in groups(quick=False, new={"new-1g": 50}).values():
        assert Group.from_text(group.to_text()) == group


def test_a_line_of_the_history_has_ratios_and_the_machine_but_no_figures(tmp_path: Path) -> None:
    both = measured("this", 10, 40, 90) + measured("base", 10, 20, 30)
    file = tmp_path / "history.jsonl"
    for _ in range(2):
        history.add(
            {"CPU": "a", "memory": "b"}, "main", both, [("requests_per_second", "this", "base")], file
        )
    lines = [json.loads(text) for text in file.read_text().splitlines()]
    assert len(lines) == 2
    assert lines[0]["ratios"] == {"hit": {"requests_per_second, this to base": [2.0, 1.0, 3.0]}}
    assert (lines[0]["machine"], lines[0]["base"]) == ({"CPU": "a"}, "main")
    assert re.fullmatch(r"[0-9a-f]+(-dirty)?|.*-g[0-9a-f]+(-dirty)?|v?[\d.]+(-dirty)?", lines[0]["commit"])


def test_mitigations_are_those_of_this_cpu(tmp_path: Path) -> None:
    for name, state in (
        ("meltdown", "Not affected"),
        ("spectre_v2", "Mitigation: Retpolines; IBPB: conditional"),
        ("mds", "Vulnerable"),
    ):
        (tmp_path / name).write_text(state + "\n")
    assert mitigations(tmp_path) == "mds: Vulnerable, spectre_v2: Retpolines"
    assert mitigations(tmp_path / "none") == "none"


def test_the_build_of_python_is_named() -> None:
    told = r"with (PGO|LTO|PGO and LTO)|without a word on PGO or LTO"
    assert re.fullmatch(rf".+, configured ({told})", python_build())
    assert interpreter_speed(1) > 0


def test_a_commit_is_checked_out_for_the_comparison(tmp_path: Path) -> None:
    code = check_out("HEAD", tmp_path)
    assert (code / "distributor_node/services/api/main.py").is_file()
    assert (code / "shared").is_dir()
