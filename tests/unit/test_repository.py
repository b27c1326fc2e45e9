"""The repository: imports, words, the wheel, make targets, pins, installation scripts, Ctrl-C in a terminal."""

from __future__ import annotations

import ast
import importlib.util
import os
import pty
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable, Iterator
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


FOLDERS = ("benchmarks", "deploy", "services", "shared", "tests")
WORDS = "whoever|nobody|anybody|somebody|anew|meanwhile|nought"
LINES_ALLOWED = 20
"""Lines below which the words may occur: the name of a user, a quotation."""


def modules_imported(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module


def test_code_is_imported_by_its_installed_name() -> None:
    """`services` and `shared` are folders of the checkout, and no packages."""
    files = [file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py")]
    assert len(files) > 100
    wrong = [
        f"{file.relative_to(ROOT)}: {module}"
        for file in files
        for module in modules_imported(file)
        if module.split(".")[0] in ("services", "shared")
    ]
    assert wrong == []


@pytest.mark.skipif(
    not (ROOT / ".git").exists() or shutil.which("git") is None, reason="needs git and a checkout"
)
def test_the_text_is_plain_english() -> None:
    done = subprocess.run(
        ["git", "grep", "-iwnE", WORDS], cwd=ROOT, check=False, capture_output=True, text=True
    )
    found = done.stdout.splitlines()
    assert len(found) < LINES_ALLOWED, "\n".join(found)


@pytest.mark.skipif(importlib.util.find_spec("setuptools") is None, reason="needs setuptools")
def test_the_wheel_installs_one_package(tmp_path: Path) -> None:
    source, wheels = tmp_path / "source", tmp_path / "wheels"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("services", "shared", "distributor_node"):
        shutil.copytree(ROOT / name, source / name, symlinks=True)
    build = f"from setuptools import build_meta; build_meta.build_wheel({str(wheels)!r})"
    done = subprocess.run(
        [sys.executable, "-c", build], cwd=source, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (wheel,) = wheels.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"distributor_node"}
    assert "distributor_node/services/api/main.py" in names
    assert not [name for name in names if name.startswith("distributor_node/services/demo")]
    assert "distributor_node/shared/adapters/state_redis/scripts/claim.lua" in names


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


LOGGING_PROGRAM = """#!/bin/sh
echo "${{0##*/}} $*" >> {log}
case "$*" in *" check") exit {check};; esac
case "$*" in *--require-hashes*) [ {hashes} = 0 ] || exit {hashes};; esac
case "${{0##*/}}" in uv) exit {uv};; esac
"""


@pytest.fixture
def install(tmp_path: Path) -> Callable[..., tuple[subprocess.CompletedProcess[str], list[str]]]:
    """Runs install.sh on an environment whose Python, and uv beside it, write down how they were called."""

    def run(
        uv: int | None = None, check: int = 0, hashes: int = 0
    ) -> tuple[subprocess.CompletedProcess[str], list[str]]:
        log, programs = tmp_path / "log", tmp_path / "environment" / "bin"
        programs.mkdir(parents=True)
        text = LOGGING_PROGRAM.format(log=log, check=check, uv=uv or 0, hashes=hashes)
        for name in ["python", *(["uv"] if uv is not None else [])]:
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
        done = subprocess.run(
            [
                "/bin/bash",
                ROOT / "deploy/environment/install.sh",
                programs.parent,
                "requirements/runtime.txt",
            ],
            env={"PATH": f"{programs}:/usr/bin:/bin", "PYTHON": sys.executable},
            check=False,
            capture_output=True,
            text=True,
        )
        return done, [
            line.replace("--quiet --disable-pip-version-check ", "") for line in log.read_text().splitlines()
        ]

    return run


HASHED = "--require-hashes --requirement requirements/runtime.hashed.txt"
PIP_INSTALL = f"python -m pip install --no-deps {HASHED}"
WITHOUT_HASHES = "python -m pip install --no-deps --requirement requirements/runtime.txt"
EDITABLE, CHECK = "python -m pip install --no-deps --editable .", "python -m pip check"


def test_pins_are_installed_without_a_resolver_and_checked(install: Any) -> None:
    done, calls = install()
    assert (done.returncode, calls[1:]) == (0, [PIP_INSTALL, EDITABLE, CHECK]), done.stderr


def test_uv_installs_the_pins_where_it_is_there(install: Any) -> None:
    done, calls = install(uv=0)
    assert done.returncode == 0, done.stderr
    assert calls[1].startswith("uv pip install --quiet --python ")
    assert calls[1].endswith(f" --no-deps {HASHED}")
    assert calls[2:] == [EDITABLE, CHECK]


def test_pip_installs_the_pins_where_uv_cannot(install: Any) -> None:
    done, calls = install(uv=1)
    assert (done.returncode, calls[2:]) == (0, [PIP_INSTALL, EDITABLE, CHECK]), done.stderr


def test_an_index_with_other_files_is_used_without_hashes(install: Any) -> None:
    done, calls = install(hashes=1)
    assert (done.returncode, calls[1:]) == (0, [PIP_INSTALL, WITHOUT_HASHES, EDITABLE, CHECK]), done.stderr
    assert done.stderr.count("installing without hashes") == 1


@pytest.mark.parametrize("name", ["runtime", "tracing", "development", "compile"])
def test_each_pin_has_hashes(name: str) -> None:
    hashed = (ROOT / f"requirements/{name}.hashed.txt").read_text().replace("\\\n", " ").splitlines()
    pins = [line for line in (ROOT / f"requirements/{name}.txt").read_text().splitlines() if "==" in line]
    assert [line.partition(" --hash")[0].split()[0] for line in hashed] == [pin.split()[0] for pin in pins]
    assert all("--hash=sha256:" in line for line in hashed)


def test_pins_that_do_not_agree_end_the_installation(install: Any) -> None:
    done, _ = install(check=1)
    assert done.returncode == 1
    assert "requirements/runtime.txt do not agree" in done.stderr


@pytest.mark.parametrize("name", ["runtime", "development"])
def test_pins_are_complete(name: str) -> None:
    """Without a resolver, what a pinned package needs is installed only if it is pinned itself."""
    lines = (ROOT / "requirements" / f"{name}.txt").read_text().splitlines()
    pins = {
        canonicalize_name(pin.name): pin
        for pin in (Requirement(line) for line in lines if line and not line.lstrip().startswith("#"))
    }
    extras = {canonicalize_name(pin.name): pin.extras for pin in map(Requirement, PROJECT["dependencies"])}
    missing = {
        f"{pin.name} needs {needed}"
        for pin in pins.values()
        if pin.marker is None or pin.marker.evaluate()
        for needed in map(Requirement, distribution(pin.name).requires or [])
        if any(
            needed.marker is None or needed.marker.evaluate({"extra": extra})
            for extra in {"", *pin.extras, *extras.get(canonicalize_name(pin.name), ())}
        )
        if canonicalize_name(needed.name) not in pins
    }
    assert not missing


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
