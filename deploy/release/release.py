"""release.py DIRECTORY: wheel, sdist and notes of the version in pyproject.toml, or why there is no release yet.

The version stands in pyproject.toml alone. CHANGELOG.md needs a section for it, with a date; the tree must be clean.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).parents[2]
BUILD = """
import sys
from setuptools import build_meta
getattr(build_meta, sys.argv[1])(sys.argv[2])
"""


def main(arguments: list[str]) -> int:
    """Write the release into the directory. The exit code: 1 if something is missing, which is said."""
    directory = Path(arguments[0]).absolute()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    version = project["project"]["version"]
    notes = release_notes((ROOT / "CHANGELOG.md").read_text(), version)
    problems = [*problems_of_version(version), *problems_of_notes(notes, version), *problems_of_tree()]
    if problems:
        print(f"no release of {version}:", *problems, sep="\n- ", file=sys.stderr)
        return 1
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"notes-{version}.md").write_text(f"{notes}\n")
    build(directory, project["build-system"]["requires"])
    print(
        f"{directory}:",
        *sorted(path.name for path in directory.iterdir() if version in path.name),
        sep="\n  ",
    )
    return 0


def release_notes(changelog: str, version: str) -> str | None:
    """Return the text of the version's section, `## [1.2.3] - 2026-01-31`. None: there is no such section."""
    heading = rf"^## \[{re.escape(version)}\] - \d{{4}}-\d{{2}}-\d{{2}}$"
    found = re.search(rf"{heading}\n(.*?)(?=^## |\Z)", changelog, re.MULTILINE | re.DOTALL)
    return None if found is None else found[1].strip()


def problems_of_version(version: str) -> list[str]:
    """Return what is wrong with the version, in words."""
    valid = re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+)?", version)
    return [] if valid else [f"pyproject.toml: expected a version such as 1.2.3 or 1.2.3rc1, got {version}"]


def problems_of_notes(notes: str | None, version: str) -> list[str]:
    """Return what is wrong with the section of the changelog, in words."""
    if notes is None:
        return [f"CHANGELOG.md: expected a section `## [{version}] - YYYY-MM-DD`"]
    return [] if notes else [f"CHANGELOG.md: expected text in the section of {version}"]


def problems_of_tree() -> list[str]:
    """Return what is not committed, in words."""
    changed = git("status", "--porcelain", "--untracked-files=no").splitlines()
    return [f"not committed: {', '.join(line[3:] for line in changed)}"] if changed else []


def build(directory: Path, requirements: list[str]) -> None:
    """Build sdist and wheel of what is committed with the project's build backend, in an environment of its own."""
    with tempfile.TemporaryDirectory() as folder:
        source, environment = Path(folder, "source"), Path(folder, "environment")
        venv.create(environment, with_pip=True)
        python = str(environment / "bin" / "python")
        pip = [python, "-m", "pip", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "install", *requirements], check=True)
        archive = Path(folder, "source.tar")
        git("archive", "--output", str(archive), "HEAD")
        shutil.unpack_archive(archive, source)
        # The time of the commit in all files: the same commit makes the same wheel.
        variables = {**os.environ, "SOURCE_DATE_EPOCH": git("log", "-1", "--format=%ct").strip()}
        for hook in ("build_sdist", "build_wheel"):
            command = [python, "-c", BUILD, hook, str(directory)]
            subprocess.run(command, check=True, cwd=source, env=variables, capture_output=True)


def git(*arguments: str) -> str:
    """Return what git prints."""
    return subprocess.run(["git", *arguments], check=True, cwd=ROOT, capture_output=True, text=True).stdout


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
