"""Metrics: what is exported, under which names, in one process and over several."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client import REGISTRY
from prometheus_client.metrics_core import Metric

from distributor_node.shared.adapters.sources.client import SourceObservation
from distributor_node.shared.observability import metrics
from distributor_node.shared.runtime.factories import count_observation

UNITS = (
    "_seconds",
    "_bytes",
    "_total",
    "_rank",
    "_slots",
    "_info",
    "_objects",
    "_files",
    "_inodes",
    "_jobs",
    "_saving",
    "_clients",
    "_pages",
    "_commands",
    "_in_progress",
    "_leader",
    "_alive",
)


def ours() -> list[Metric]:
    return [family for family in REGISTRY.collect() if family.name.startswith("distributor_")]


def test_every_name_ends_in_its_unit() -> None:
    for family in ours():
        name = family.name + ("_total" if family.type == "counter" else "")
        assert name.endswith(UNITS), name


def test_no_object_id_is_a_label() -> None:
    labels = {label for family in ours() for sample in family.samples for label in sample.labels}
    assert not labels & {"object_id", "id", "path", "url", "request_id"}


def test_an_unset_gauge_is_not_exported() -> None:
    gauge = metrics.ReportedGauge("distributor_test_reported_bytes", "A test's.")
    assert b"distributor_test_reported_bytes" not in metrics.render_metrics()[0]
    gauge.set(3)
    gauge.set(4)
    assert b"distributor_test_reported_bytes 4.0" in metrics.render_metrics()[0]


def test_a_source_is_its_host_and_port_without_credentials() -> None:
    assert metrics.source_label("https://user:secret@Source.Example:8443/api/v1/") == "source.example:8443"
    assert metrics.source_label("nonsense") == "unknown"


def test_sources_beyond_the_bound_share_one_label(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_sources_seen", set())
    labels = {
        metrics.source_label(f"http://s{number}.example/") for number in range(metrics.MAX_SOURCES + 50)
    }
    assert len(labels) == metrics.MAX_SOURCES + 1
    assert "other" in labels


def test_invented_methods_share_one_label() -> None:
    assert metrics.method_label("GET") == "GET"
    assert metrics.method_label("BREW-17") == "other"


WORKER = """
from distributor_node.shared.adapters.sources.client import SourceObservation
from distributor_node.shared.observability import metrics
from distributor_node.shared.runtime.factories import count_observation
metrics.REQUESTS.labels("GET", "200", "hit").inc(3)
metrics.REQUESTS_IN_PROGRESS.inc(2)
metrics.STORAGE_USED.set({used})
"""
STARTER = """
import subprocess, sys
from pathlib import Path
from distributor_node.shared.observability.multiprocess import forget_process, prepare_multiprocess
directory = Path(sys.argv[1])
prepare_multiprocess(directory)
assert not (directory / "counter_1.db").exists(), "wiped"
workers = []
for used in (10, 20):
    worker = subprocess.Popen([sys.executable, "-c", {worker!r}.replace("{{used}}", str(used))])
    assert worker.wait() == 0
    workers.append(worker.pid)
forget_process(workers[0])
forget_process(workers[1])
left = sorted(file.name for file in directory.glob("*.db"))
assert left and all(name.endswith("_ended.db") for name in left), left
from distributor_node.shared.observability.metrics import render_metrics
body, media_type = render_metrics()
assert media_type.startswith("text/plain"), media_type
print(body.decode())
"""


def test_several_processes_add_up(tmp_path: Path) -> None:
    (tmp_path / "counter_1.db").write_bytes(b"left behind")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", STARTER.format(worker=WORKER), str(tmp_path)],
        check=True,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert 'distributor_requests_total{cache="hit",method="GET",status="200"} 6.0' in done.stdout
    assert "distributor_requests_in_progress 2.0" not in done.stdout
    assert "distributor_storage_used_bytes 20.0" in done.stdout


def test_multiprocess_mode_cannot_come_too_late() -> None:
    script = (
        "import prometheus_client\n"
        "from distributor_node.shared.observability.multiprocess import prepare_multiprocess\n"
        "prepare_multiprocess(None)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], check=False, capture_output=True, text=True, timeout=30
    )
    assert "must be prepared before" in done.stderr


OWNER = """
import sys, time
from distributor_node.shared.observability.multiprocess import owned_directory
with owned_directory("distributor-test-") as directory:
    (directory / "counter_1.db").write_text("")
    print(directory, flush=True)
    sys.stdin.read()
"""


def start_owner(temporary: Path) -> tuple[subprocess.Popen[str], Path]:
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(temporary)},
    )
    assert owner.stdout is not None
    return owner, Path(owner.stdout.readline().strip())


def test_the_directory_of_a_killed_process_is_removed_by_the_next_start(tmp_path: Path) -> None:
    foreign = tmp_path / "distributor-test-of-another-version"
    foreign.mkdir()
    killed, abandoned = start_owner(tmp_path)
    alive, kept = start_owner(tmp_path)
    killed.kill()
    killed.communicate()
    assert abandoned.is_dir()
    third, another = start_owner(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([foreign, kept, another])
    assert (kept / "counter_1.db").exists()
    for owner in (alive, third):
        owner.communicate("end")
        assert owner.returncode == 0
    assert list(tmp_path.iterdir()) == [foreign]


def test_counters_used_by_alerts_are_precreated() -> None:
    script = (
        "from distributor_node.shared.observability.metrics import describe_build, render_metrics\n"
        "describe_build('1', 'evictor')\n"
        "print(render_metrics()[0].decode())"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], check=True, capture_output=True, text=True, timeout=30
    )
    assert 'distributor_scrubbed_objects_total{result="corrupt"} 0.0' in done.stdout
    assert "distributor_aborted_responses_total{" not in done.stdout


def test_a_source_failing_midway_is_one_request_and_one_failure() -> None:
    count_observation(SourceObservation("cutting:80", 0.1, 0.2, 10, "unreachable"))
    count_observation(SourceObservation("cutting:80", None, 3.0, 0, "unreachable"))
    count_observation(SourceObservation("cutting:80", 0.1, 0.2, 10, None))
    labels = {"source": "cutting:80"}
    assert REGISTRY.get_sample_value("distributor_source_requests_total", labels) == 3
    failures = {**labels, "reason": "unreachable"}
    assert REGISTRY.get_sample_value("distributor_source_failures_total", failures) == 2
