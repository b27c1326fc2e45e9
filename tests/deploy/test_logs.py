"""deploy/logs: a configuration of Vector, and the document that names its fields."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

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


@pytest.mark.skipif(shutil.which("vector") is None, reason="no vector here")
def test_vector_agrees() -> None:
    done = subprocess.run(
        ["vector", "validate", "--no-environment", FILE],
        env={"PATH": "/usr/bin:/bin:/usr/local/bin", "ELASTICSEARCH_URL": "http://127.0.0.1:9200"}
        | dict.fromkeys(("ELASTICSEARCH_USER", "ELASTICSEARCH_PASSWORD"), "x"),
        check=False, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
