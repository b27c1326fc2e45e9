"""What CI runs: Docker's tests too where there is an engine. make, docker and the image builder are stand-ins here."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class Machine:
    """A checkout at `folder`/checkout, and the commands that its CI finds."""

    folder: Path

    def has(self, command: str, script: str) -> None:
        path = self.folder / command
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    def has_image_builder(self, script: str) -> None:
        self.has("shared/tools/standin-images", f'echo "builder $*"\n{script}')

    def run(self, **settings: str) -> tuple[int, str]:
        """Its exit code and all it said."""
        path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        done = subprocess.run(
            [self.folder / "checkout" / ".ci" / "run"],
            check=False, capture_output=True, text=True, timeout=30, env={"PATH": path, **settings},
        )  # fmt: skip
        return done.returncode, done.stdout + done.stderr


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """Every target of make is fine; there is no engine, and no image builder."""
    (tmp_path / "checkout" / ".ci").mkdir(parents=True)
    shutil.copy(ROOT / ".ci" / "run", tmp_path / "checkout" / ".ci" / "run")
    made = Machine(tmp_path)
    made.has("bin/make", 'echo "made $1"')
    made.has("bin/docker", "exit 1")
    made.has("bin/id", "echo 0")
    return made


def test_a_machine_without_an_engine_passes_and_says_so(machine: Machine) -> None:
    code, said = machine.run()
    assert code == 0
    assert "made test\n" in said
    assert "skipped: make test-docker (no Docker engine" in said
    assert "made test-docker" not in said


def test_a_machine_where_no_engine_starts_passes(machine: Machine) -> None:
    machine.has_image_builder("exit 1")
    code, said = machine.run()
    assert code == 0
    assert "builder --no-images" in said
    assert "skipped: make test-docker (no Docker engine" in said


def test_a_browser_is_used_where_there_is_one(machine: Machine) -> None:
    assert "skipped: make test-browser (no browser" in machine.run()[1]
    machine.has("checkout/deploy/servers/find-or-install.sh", 'echo "looked for $*"')
    code, said = machine.run()
    assert code == 0
    assert "looked for chromium npm" in said
    assert "made test-browser" in said
    machine.has("bin/make", 'test "$1" != test-browser')
    code, said = machine.run()
    assert code != 0
    assert "FAILED: make test-browser" in said
    assert "skipped: make test-browser (SKIP" in machine.run(SKIP_BROWSER="1")[1]


def test_an_engine_without_images_is_a_failure(machine: Machine) -> None:
    machine.has("bin/docker", "exit 0")
    machine.has_image_builder("exit 1")
    code, said = machine.run()
    assert code != 0
    assert said.count("builder --compose docker-compose.yml") == 2
    assert "FAILED: images for make test-docker" in said
    assert "made test-docker" not in said


def test_an_engine_that_was_started_is_used_and_stopped(machine: Machine) -> None:
    started = machine.folder / "started"
    machine.has("bin/docker", f"test -e {started}")
    machine.has_image_builder(f"touch {started}")
    code, said = machine.run()
    assert code == 0
    assert "ok: make test-docker" in said
    assert "builder --stop" in said


def test_an_engine_that_was_there_is_left_alone(machine: Machine) -> None:
    machine.has("bin/docker", "exit 0")
    machine.has_image_builder("exit 0")
    code, said = machine.run()
    assert code == 0
    assert "ok: make test-docker" in said
    assert "builder --stop" not in said


def test_a_failing_target_fails_it_all(machine: Machine) -> None:
    machine.has("bin/docker", "exit 0")
    machine.has("bin/make", 'test "$1" != test-docker')
    code, said = machine.run()
    assert code != 0
    assert "FAILED: make test-docker" in said


def test_docker_can_be_left_out(machine: Machine) -> None:
    machine.has("bin/docker", "exit 0")
    code, said = machine.run(SKIP_DOCKER="1")
    assert code == 0
    assert "skipped: make test-docker (SKIP_DOCKER is set)" in said
