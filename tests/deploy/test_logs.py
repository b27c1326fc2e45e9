"""deploy/logs: a configuration of Vector, run over lines of ours, and the document that names its fields."""

from __future__ import annotations

import io
import json
import logging
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
import yaml
from vrl_python import VRLRuntime

from distributor_node.services.api.request_log import RequestRecord, log_request
from distributor_node.shared.observability.logging import configure_logging

ROOT = Path(__file__).parents[2]
FILE = ROOT / "deploy" / "logs" / "vector.yaml"
DOCUMENT = (ROOT / "docs" / "logs.md").read_text()


def test_lines_go_from_the_containers_to_elasticsearch() -> None:
    configuration = yaml.safe_load(FILE.read_text())
    assert configuration["transforms"]["fields"]["inputs"] == list(configuration["sources"])
    assert configuration["sinks"]["elasticsearch"]["inputs"] == list(configuration["transforms"])
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    project = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", compose["name"])
    assert configuration["sources"]["containers"]["include_labels"] == [
        f"com.docker.compose.project={project}"
    ]


def test_fields_that_get_another_name_are_in_the_document() -> None:
    source = yaml.safe_load(FILE.read_text())["transforms"]["fields"]["source"]
    renamed = set(re.findall(r"del\(fields\.(\w+)\)", source))
    assert renamed == set(re.findall(r"fields\.(\w+)", source))
    table = DOCUMENT[DOCUMENT.index("| in the line | in Elasticsearch |") :]
    assert renamed <= set(re.findall(r"`(\w+)`", table))


# Vector's own language, compiled and run as Vector does it: its compiler refuses a call whose failure is not handled.


@pytest.fixture(scope="module")
def program() -> str:
    source: str = yaml.safe_load(FILE.read_text())["transforms"]["fields"]["source"]
    assert "${NODE_NAME:-distributor-node}" in source
    return source.replace("${NODE_NAME:-distributor-node}", "named by the collector")


@pytest.fixture
def written() -> Iterator[Callable[[], list[str]]]:
    """The lines that this process has logged since, as a container's are."""
    root, stream = logging.getLogger(), io.StringIO()
    handlers, level = list(root.handlers), root.level
    process = {"service": "fetcher", "node": "media-1", "version": "1.2.3"}
    configure_logging("debug", "json", stream, process)
    yield lambda: stream.getvalue().splitlines()
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)
    structlog.reset_defaults()


def shipped(program: str, line: str) -> dict[str, Any]:
    """What is sent to Elasticsearch for one line of a container."""
    event = {
        "message": line,
        "timestamp": "2026-01-31T10:00:00Z",
        "host": "host-1",
        "container_name": "node-api-1",
        "label": {"com.docker.compose.service": "api"},
    }
    return VRLRuntime().run(program, event, "UTC").processed_event


def test_the_program_compiles_and_the_compiler_finds_faults(program: str) -> None:
    assert VRLRuntime.check_syntax(program) is None
    unknown = program.replace("to_int(fields.status)", "to_integer(fields.status)")
    assert "undefined function" in str(VRLRuntime.check_syntax(unknown))
    unhandled = program.replace("status, wrong = to_int(", "status = to_int(")
    assert "unhandled fallible assignment" in str(VRLRuntime.check_syntax(unhandled))


def test_a_request_has_the_schemas_names(program: str, written: Callable[[], list[str]]) -> None:
    record = RequestRecord("r-1", "GET", "/api/v1/assets/<object_id>", "42", size=9, client="198.51.100.7")
    log_request(record, 206, cache="hit", source="local", sent=5)
    (line,) = written()
    got = shipped(program, line)
    assert got["@timestamp"].replace(" ", "T")[:19] == json.loads(line)["timestamp"][:19]
    assert got["service"] == {"name": "fetcher", "node": {"name": "media-1"}, "version": "1.2.3"}
    assert got["log"] == {"level": "info", "logger": "distributor_node.services.api.request_log"}
    assert got["trace"] == {"id": "r-1"}
    assert got["client"] == {"address": "198.51.100.7"}
    assert got["url"] == {"path": "/api/v1/assets/<object_id>"}
    assert got["http"] == {
        "request": {"method": "GET"},
        "response": {"status_code": 206, "body": {"bytes": 5}},
    }
    assert got["message"] == got["event"]["action"] == "request_answered"
    assert got["event"]["duration"] == round(json.loads(line)["duration_ms"] * 1e6)
    assert got["distributor"] == {"object_id": "42", "size": 9, "x_cache": "hit", "source": "local"}


def test_any_other_event_is_kept_below_one_name(program: str, written: Callable[[], list[str]]) -> None:
    try:
        raise ValueError("torn")
    except ValueError:
        structlog.get_logger("tests").exception("fetch_failed", reason="torn", tried=["a", "b"], by={"s": 1})
    got = shipped(program, *written())
    assert got["error"]["stack_trace"].endswith("ValueError: torn")
    assert got["event"] == {"action": "fetch_failed"}
    assert got["distributor"] == {"reason": "torn", "tried": '["a","b"]', "by": '{"s":1}'}
    assert "http" not in got


@pytest.mark.parametrize(
    "line", ["ready to accept connections", "", "[1]", '"text"', "{", "{}", '{"event": 5}']
)
def test_a_line_of_another_program_stays_a_message(program: str, line: str) -> None:
    got = shipped(program, line)
    assert got.get("message", "") == line
    assert got["@timestamp"] == "2026-01-31T10:00:00Z"
    assert got["service"] == {"name": "api", "node": {"name": "named by the collector"}}
    assert got["container"] == {"name": "node-api-1"}


@pytest.mark.skipif(shutil.which("vector") is None, reason="no vector here")
def test_vector_agrees() -> None:
    done = subprocess.run(
        ["vector", "validate", "--no-environment", FILE],
        env={"PATH": "/usr/bin:/bin:/usr/local/bin", "ELASTICSEARCH_URL": "http://127.0.0.1:9200"}
        | dict.fromkeys(("ELASTICSEARCH_USER", "ELASTICSEARCH_PASSWORD"), "x"),
        check=False, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
