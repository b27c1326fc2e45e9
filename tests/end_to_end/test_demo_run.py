"""`make run`: the demo node, on either catalog."""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest

from distributor_node.services.demo.objects import MIB
from distributor_node.services.demo_run.__main__ import free_port_from, port_number
from distributor_node.shared.domain.errors import ConfigurationError
from distributor_node.shared.runtime.run_service import MISCONFIGURED
from tests.servers.redis_server import free_port


@contextmanager
def running_demo(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """The demo's process, and what it has printed, up to the first command to try."""
    demo = subprocess.Popen(
        [sys.executable, "-m", "distributor_node.services.demo_run", *arguments],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert demo.stdout is not None
        said: list[str] = []
        for line in demo.stdout:  # ends with the process, at the latest
            said.append(line)
            if line.strip().startswith("curl -sD - -o /dev/null http"):
                break
        yield demo, said
    finally:
        demo.kill()
        demo.wait(10)
        if demo.stdout is not None:
            demo.stdout.close()


def read_json(request: str | Request) -> dict[str, Any]:
    with urlopen(request, timeout=20) as answer:
        found: dict[str, Any] = json.load(answer)
        return found


def played(page: str, scene: str) -> dict[str, Any]:
    """What the page shows at the end of a scene."""
    told = read_json(Request(f"{page}story/{scene}", method="PUT"))
    ends = time.monotonic() + 120
    while told["running"]:
        assert time.monotonic() < ends, told
        time.sleep(0.1)
        told = read_json(f"{page}story.json")
    return told


def test_a_viewer_who_leaves_makes_a_partial_object_that_the_next_ones_complete(tmp_path: Path) -> None:
    with running_demo("--port", str(free_port()), "--data", str(tmp_path)) as (_, said):
        (page,) = [line.split()[0] for line in said if "demo page" in line]
        (own_page,) = [line.split()[0] for line in said if "the node's own page" in line]
        told = played(page, "leave")
        (viewer,) = told["viewers"]
        assert (told["note"], viewer["state"], viewer["cache"]) == ("over", "left", "miss")
        (download,) = [one for source in told["sources"] for one in source["downloads"]]
        # A window of 8 MiB, and what was on its way.
        assert 8 * MIB < download["sent"] < 32 * MIB < told["film"]["size"]
        assert read_json(f"{own_page}snapshot.json")["volume"]["parked"]["objects"] == 1
        told = played(page, "viewers")
        assert {one["state"] for one in told["viewers"]} == {"done"}
        assert all(one["first"] >= 8 * MIB for source in told["sources"] for one in source["downloads"])
        assert played(page, "forget")["note"] == "over"


@pytest.mark.parametrize("catalog", ["manifest", "joystream"])
def test_a_demo_node_answers_as_it_says(tmp_path: Path, catalog: str) -> None:
    arguments = ["--catalog", catalog, "--port", str(free_port()), "--data", str(tmp_path)]
    with running_demo(*arguments) as (demo, said):
        url = said[-1].split()[-1]
        with urlopen(url, timeout=20) as answer:
            assert (answer.status, answer.headers["X-Cache"]) == (200, "miss")
            assert answer.headers["Content-Type"].startswith("image/")
            assert len(answer.read()) == int(answer.headers["Content-Length"])
        assert any("Demo squid" in line for line in said) == (catalog == "joystream")
        demo.send_signal(signal.SIGINT)
        assert demo.wait(30) == 0


@pytest.mark.parametrize("text", ["0", "65536", "abc", "-1"])
def test_a_port_that_is_none(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="expected a port from 1 to 65535, got"):
        port_number(text)


def test_the_last_port(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigurationError, match="no free port"):
        free_port_from(65535, {65535})


def test_a_data_folder_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    ended = subprocess.run(
        [sys.executable, "-m", "distributor_node.services.demo_run", "--data", str(tmp_path / "file")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == MISCONFIGURED
    assert f"--data: cannot use {tmp_path / 'file'}: File exists" in ended.stderr
    assert "Traceback" not in ended.stderr
