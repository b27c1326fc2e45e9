"""`distributor init` at a terminal: each answer is checked when it is given, and asked for again with the reason."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml


def talk(file: Path, replies: Sequence[tuple[str, str]], *options: str) -> tuple[int, str]:
    """Answer each question with its reply, once its text is shown. Returns the exit code, and all that was shown."""
    command = [sys.executable, "-m", "distributor_node.services.command_line", "init", str(file), *options]
    controller, terminal = pty.openpty()
    environment = {"PATH": "/usr/bin:/bin", "NO_COLOR": "1", "COLUMNS": "200"}
    shown, everything = "", ""
    with subprocess.Popen(
        command, env=environment, stdin=terminal, stdout=terminal, stderr=terminal
    ) as process:
        os.close(terminal)
        for question, reply in [*replies, ("", "")]:
            try:
                while not question or question not in shown:
                    if not select.select([controller], [], [], 30)[0]:
                        process.kill()
                        pytest.fail(f"expected {question!r}, was shown {everything + shown}")
                    shown += os.read(controller, 1000).decode()
            except OSError:  # the command has ended
                everything += shown
                break
            everything, shown = everything + shown, ""
            os.write(controller, f"{reply}\n".encode())
        code = process.wait(30)
    os.close(controller)
    return code, everything


def test_an_invalid_answer_is_asked_for_again_with_the_reason(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    replies = [
        ("Kind of catalog", "squid"),
        ("catalog.kind: expected manifest, origin, joystream, got 'squid'", "origin"),
        ("URL template", "https://site.example/"),
        ("catalog.origin: expected", "https://site.example/{id}"),
        ("Directory", ""),
        ("Storage limit", "much"),
        ("storage.limit: expected a number and a unit", "5T"),
        ("Redis and RabbitMQ", "n"),
    ]
    code, shown = talk(file, replies)
    assert code == 0, shown
    assert yaml.safe_load(file.read_text()) == {
        "catalog": {"kind": "origin", "origin": "https://site.example/{id}"},
        "storage": {"path": "/var/lib/distributor", "limit": "5T"},
    }


@pytest.mark.parametrize("name", ["there.yaml", "none/settings.yaml"])
def test_nothing_is_asked_for_a_file_that_cannot_be_made(tmp_path: Path, name: str) -> None:
    (tmp_path / "there.yaml").touch()
    code, shown = talk(tmp_path / name, [])
    assert code == 2
    assert f"{name}: expected a file that can be made, got: " in shown
    assert "Kind of catalog" not in shown


def test_an_invalid_option_ends_the_command_before_more_is_asked(tmp_path: Path) -> None:
    code, shown = talk(
        tmp_path / "s.yaml", [], "--catalog", "manifest", "--source", "m.yaml", "--limit", "much"
    )
    assert code == 2
    assert "storage.limit: expected a number and a unit" in shown
    assert "Directory of the volume" not in shown
