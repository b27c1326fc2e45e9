"""`make release`: a version from one place, a section of the changelog, what is committed."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
CHANGELOG = (
    "# Log\n\n## [Unreleased]\n\n## [1.2.3] - 2026-01-31\n\n### Added\n\n- x\n\n## [1.2.2] - 2025-12-31\n\n"
)


@pytest.fixture(scope="module")
def release() -> ModuleType:
    specification = importlib.util.spec_from_file_location(
        "release", ROOT / "deploy" / "release" / "release.py"
    )
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_the_notes_are_the_versions_section(release: ModuleType) -> None:
    assert release.release_notes(CHANGELOG, "1.2.3") == "### Added\n\n- x"
    assert release.release_notes(CHANGELOG, "1.2.2") == ""
    assert release.release_notes(CHANGELOG, "1.2.4") is None
    assert release.release_notes(CHANGELOG.replace(" - 2026-01-31", ""), "1.2.3") is None


@pytest.mark.parametrize(
    ("version", "notes", "told"),
    [
        ("1.2.3", "text", None),
        ("1.2.3rc1", "text", None),
        ("1.2", "text", "pyproject.toml: expected a version such as 1.2.3 or 1.2.3rc1, got 1.2"),
        ("1.2.3", "", "CHANGELOG.md: expected text in the section of 1.2.3"),
        ("1.2.3", None, "CHANGELOG.md: expected a section `## [1.2.3] - YYYY-MM-DD`"),
    ],
)
def test_what_is_missing_is_said(
    release: ModuleType, version: str, notes: str | None, told: str | None
) -> None:
    problems = [*release.problems_of_version(version), *release.problems_of_notes(notes, version)]
    assert problems == ([told] if told else [])


@pytest.mark.skipif(
    not (ROOT / ".git").exists() or shutil.which("git") is None, reason="needs git and a checkout"
)
def test_no_release_without_a_section(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", "--depth", "1", f"file://{ROOT}", clone], check=True)
    shutil.copytree(ROOT / "deploy" / "release", clone / "deploy" / "release", dirs_exist_ok=True)
    changelog = (clone / "CHANGELOG.md").read_text()
    (clone / "CHANGELOG.md").write_text(
        re.sub(rf"^## \[{re.escape(VERSION)}\].*$", "", changelog, flags=re.MULTILINE)
    )
    (clone / "README.md").write_text("changed")
    done = subprocess.run(
        [sys.executable, clone / "deploy" / "release" / "release.py", tmp_path / "dist"],
        check=False,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, (tmp_path / "dist").exists()) == (1, False)
    assert f"expected a section `## [{VERSION}]" in done.stderr
    assert re.search(r"not committed: .*README.md", done.stderr)


def test_the_version_stands_in_one_place() -> None:
    found = subprocess.run(
        ["grep", "-rnF", f'"{VERSION}"', "pyproject.toml", "services", "shared", "deploy", "--include=*.py"],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
    )
    # The API has a version of its own.
    others = [line for line in found.stdout.splitlines() if "openapi.py" not in line]
    assert not others


def test_the_image_bears_labels_of_the_release() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    script = (ROOT / "deploy" / "release" / "image.sh").read_text()
    for argument in ("VERSION", "REVISION", "CREATED"):
        assert f"ARG {argument}" in dockerfile
        assert f'image.{argument.lower()}="${argument}"' in dockerfile
        assert f"--build-arg {argument}=" in script
    stages = re.findall(r"^FROM \S+ AS (\w+)$", dockerfile, re.MULTILINE)
    assert stages[-1] == "node"  # what is built when no stage is named
    assert "services/demo" not in dockerfile[dockerfile.index("AS node") :]


FAKE_DOCKER = """#!/bin/sh
case "$*" in
"buildx inspect") echo "Driver:        $DRIVER" ;;
info*) echo "[[$STORE]]" ;;
"buildx build"*) printf '%s\\n' "$@" > "$ARGUMENTS" ;;
esac
"""


@pytest.mark.parametrize(
    ("driver", "store", "output", "builds"),
    [
        ("docker", "Backing Filesystem extfs", "", False),
        ("docker", "driver-type io.containerd.snapshotter.v1", "", True),
        ("docker", "Backing Filesystem extfs", "--load", True),
        ("docker-container", "Backing Filesystem extfs", "", True),
    ],
)
@pytest.mark.skipif(
    not (ROOT / ".git").exists() or shutil.which("git") is None, reason="needs git and a checkout"
)
def test_a_builder_that_cannot_is_named_before_it_fails(
    tmp_path: Path, driver: str, store: str, output: str, builds: bool
) -> None:
    """Docker's default builder writes neither archives nor images for two platforms."""
    (tmp_path / "docker").write_text(FAKE_DOCKER)
    (tmp_path / "docker").chmod(0o755)
    done = subprocess.run(
        [ROOT / "deploy" / "release" / "image.sh", tmp_path / "dist"],
        cwd=ROOT, check=False, capture_output=True, text=True, timeout=60,
        env={
            "PATH": f"{tmp_path}:/usr/bin:/bin",
            "DRIVER": driver,
            "STORE": store,
            "ARGUMENTS": str(tmp_path / "arguments"),
            **({"IMAGE_OUTPUT": output} if output else {}),
        },
    )  # fmt: skip
    assert done.returncode == (0 if builds else 1), done.stderr
    if not builds:
        assert "docker buildx create --use" in done.stderr
        return
    arguments = (tmp_path / "arguments").read_text().splitlines()
    assert f"VERSION={VERSION}" in arguments
    assert f"distributor-node:{VERSION}" in arguments
    assert (output or f"type=oci,dest={tmp_path}/dist/distributor-node-{VERSION}.oci.tar") in arguments
