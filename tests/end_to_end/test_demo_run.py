"""`make run`: the demo node, on either catalog."""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
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
from distributor_node.services.demo_run.__main__ import DEFAULT_PORTS, HOST, free_port_from, port_number
from distributor_node.shared.domain.errors import ConfigurationError
from distributor_node.shared.runtime.run_service import MISCONFIGURED
from tests.end_to_end.operator_client import OperatorClient
from tests.servers.operator_token import SECRET
from tests.servers.redis_server import free_port


@contextmanager
def running_demo(*arguments: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """The demo's process, and what it has printed, up to the first command to try."""
    demo = subprocess.Popen(
        [sys.executable, "-m", "distributor_node.services.demo_run", *arguments],
        env={**os.environ, **environment},
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


def operator_line(said: list[str]) -> str:
    (line,) = [line.strip() for line in said if "operator API:" in line]
    return line


async def test_a_second_demo_has_an_operator_port_of_its_own(tmp_path: Path) -> None:
    secret = {"DISTRIBUTOR_OPERATOR_API__SECRET": SECRET}
    first, second = tmp_path / "1", tmp_path / "2"
    with running_demo("--port", str(free_port()), "--data", str(first), **secret) as (_, said):
        ports = [int(operator_line(said).split()[0].rpartition(":")[2])]
        with running_demo("--port", str(free_port()), "--data", str(second), **secret) as (_, said_next):
            ports.append(int(operator_line(said_next).split()[0].rpartition(":")[2]))
            assert "distributor operator --config" in operator_line(said_next)
            for port in ports:
                assert not (await OperatorClient(port).query("orders"))["draining"]
    assert ports[1] not in {ports[0], *DEFAULT_PORTS}


def test_the_demo_says_how_to_turn_on_its_operator_api(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DISTRIBUTOR_OPERATOR_API__SECRET", raising=False)
    with running_demo("--port", str(free_port()), "--data", str(tmp_path)) as (_, said):
        assert operator_line(said).startswith("(turned off)")
        assert "set DISTRIBUTOR_OPERATOR_API__SECRET" in operator_line(said)


def test_no_urls_are_printed_while_the_operator_port_is_in_use(tmp_path: Path) -> None:
    with socket.create_server((HOST, 0)) as taken:
        port = str(taken.getsockname()[1])
        settings = {"DISTRIBUTOR_OPERATOR_API__SECRET": SECRET, "DISTRIBUTOR_OPERATOR_API__PORT": port}
        with running_demo("--port", str(free_port()), "--data", str(tmp_path), **settings) as (demo, said):
            assert demo.wait(30) == MISCONFIGURED
    assert not [line for line in said if "The node is up" in line]


def test_other_services_keep_their_default_ports() -> None:
    for port in DEFAULT_PORTS:
        assert free_port_from(port, {port}) not in DEFAULT_PORTS


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
