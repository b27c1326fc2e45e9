"""Which Python `make setup` takes."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "deploy/environment/find-python.sh"


class Machine:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def has(self, name: str, version: str, options: str, *, pip: bool = True) -> str:
        """A Python of that version, which was configured with `options`. Returns its path."""
        made = self.folder / name
        made.write_text(
            "#!/bin/bash\n"
            'case "$2" in\n'
            f'*version_info*) [ "$(printf "%s\\n" 3.11 {version} | sort -V | head -1)" = 3.11 ];;\n'
            f'*CONFIG_ARGS*) case "{options}" in *--enable-optimizations*) exit 1;; esac;;\n'
            f"*ensurepip*) exit {0 if pip else 1};;\n"
            "esac\n"
        )
        made.chmod(0o755)
        return str(made)

    def find(self, **more: str) -> tuple[int, str, str]:
        """Exit code, the Python that is taken, and what is said."""
        environment = {
            "PATH": f"{self.folder}:{os.environ['PATH']}",
            "SYSTEM_PYTHON": str(self.folder / "system"),
            **more,
        }
        ran = subprocess.run(
            ["bash", str(SCRIPT)], check=False, env=environment, capture_output=True, text=True
        )
        return ran.returncode, ran.stdout.strip(), ran.stderr


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_the_first_on_the_path_is_taken(machine: Machine) -> None:
    machine.has("python3", "3.12", "--enable-optimizations --with-lto")
    machine.has("system", "3.11", "")
    assert machine.find() == (0, "python3", "")


def test_one_compiled_without_optimisation_gives_way_to_the_distributions(machine: Machine) -> None:
    machine.has("python3", "3.12", "--enable-shared")
    system = machine.has("system", "3.11", "")
    code, found, said = machine.find()
    assert (code, found) == (0, system)
    assert "PYTHON=python3 takes it all the same" in said


def test_but_not_if_that_is_too_old_or_cannot_make_an_environment(machine: Machine) -> None:
    machine.has("python3", "3.12", "")
    assert machine.find()[1] == "python3"
    machine.has("system", "3.9", "")
    assert machine.find()[1] == "python3"
    machine.has("system", "3.11", "", pip=False)
    assert machine.find()[1] == "python3"


def test_the_one_that_was_named_is_taken(machine: Machine) -> None:
    machine.has("python3", "3.12", "--enable-optimizations")
    named = machine.has("named", "3.11", "")
    machine.has("system", "3.11", "")
    assert machine.find(PYTHON=named) == (0, named, "")


def test_none_that_is_new_enough_is_an_error_that_says_what_to_do(machine: Machine) -> None:
    for name in ("python3", "python3.14", "python3.13", "python3.12", "python3.11"):
        machine.has(name, "3.9", "")
    code, found, said = machine.find()
    assert (code, found) == (1, "")
    assert "Python 3.11 or newer is needed" in said
