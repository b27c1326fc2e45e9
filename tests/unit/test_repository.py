"""The house around the code: make targets, pins, installation scripts, what a terminal's Ctrl-C does."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize("name", ["runtime", "development"])
def test_pins_are_exact_and_name_no_host(name: str) -> None:
    text = (ROOT / "requirements" / f"{name}.txt").read_text()
    pins = [line for line in text.splitlines() if line and not line.lstrip().startswith("#")]
    assert all(re.match(r"[A-Za-z0-9._\[\],-]+==[0-9][^ ]*( ; .+)?$", pin) for pin in pins), pins
    assert "://" not in text
    assert "--" not in text


def test_both_pin_files_agree() -> None:
    runtime, development = (
        set(re.findall(r"^[^#\s].*==.*$", (ROOT / "requirements" / f"{name}.txt").read_text(), re.MULTILINE))
        for name in ("runtime", "development")
    )
    assert runtime <= development


def test_every_dependency_has_its_reason() -> None:
    decisions = (ROOT / "docs" / "decisions.md").read_text()
    for dependency in PROJECT["dependencies"]:
        name = re.split(r"[\[>=<]", dependency)[0]
        assert re.search(rf"\*\*{re.escape(name)}(\[|\*\*)", decisions), name


def test_make_lists_its_targets() -> None:
    done = subprocess.run(["make"], cwd=ROOT, check=True, capture_output=True, text=True)
    for target in (
        "setup",
        "run",
        "test",
        "test-unit",
        "check",
        "format",
        "lock",
        "bench",
        "up",
        "down",
        "logs",
    ):
        assert f"make {target} " in done.stdout


def test_missing_servers_are_named(tmp_path: Path) -> None:
    done = subprocess.run(
        ["/bin/bash", ROOT / "deploy" / "servers" / "find-or-install.sh"],
        env={"PATH": str(tmp_path), "SERVER_DIRECTORIES": str(tmp_path)},
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "apt-get install --no-install-recommends redis-server rabbitmq-server" in done.stderr


def test_servers_that_are_there_are_found(tmp_path: Path) -> None:
    for name in ("redis-server", "rabbitmq-server"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(
        ["/bin/bash", ROOT / "deploy" / "servers" / "find-or-install.sh"],
        env={"PATH": "/nowhere", "SERVER_DIRECTORIES": str(tmp_path)},
        check=False,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_machine_without_python_gets_instructions(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            "/bin/bash",
            ROOT / "deploy" / "environment" / "install.sh",
            tmp_path / "v",
            "requirements/runtime.txt",
        ],
        env={"PATH": str(tmp_path)},
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "Python 3.11 or newer is needed" in done.stderr


CHILD = """
import signal, sys
def stop(*_):
    print("stopped", flush=True)
    sys.exit(0)
signal.signal(signal.SIGINT, stop)
print("running", flush=True)
signal.pause()
"""


def test_ctrl_c_stops_the_node_and_make_reports_no_failure(tmp_path: Path) -> None:
    (tmp_path / "child.py").write_text(CHILD)
    foreground = ROOT / "deploy" / "environment" / "foreground.py"
    (tmp_path / "Makefile").write_text(f"run:\n\t@{sys.executable} {foreground} {sys.executable} child.py\n")
    controller, terminal = pty.openpty()
    # `setsid --ctty` gives make a terminal of its own, as a login does.
    process = subprocess.Popen(
        ["setsid", "--ctty", "--wait", "make", "run"],
        cwd=tmp_path,
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
    )
    os.close(terminal)
    shown = b""
    while b"running" not in shown:
        shown += os.read(controller, 1000)
    os.write(controller, b"\x03")
    while b"stopped" not in shown:
        shown += os.read(controller, 1000)
    code = process.wait(timeout=60)
    os.close(controller)
    assert code == 0
    assert b"***" not in shown
