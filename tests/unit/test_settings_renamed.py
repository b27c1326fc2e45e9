"""A renamed setting still works under its former name, and says so."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from distributor_node.shared.domain.errors import ConfigurationError
from distributor_node.shared.settings import load_settings

FORMER, CURRENT = "evictor.duty_interval", "evictor.assignment_interval"
VARIABLE = "DISTRIBUTOR_EVICTOR__DUTY_INTERVAL"


def settings_file(folder: Path, evictor: str = "") -> Path:
    file = folder / "node.yaml"
    file.write_text(
        f"catalog: {{kind: joystream}}\nstorage: {{path: {folder}}}\nworker_id: 1\n"
        f"evictor: {{partial_keep: 60{evictor}}}\n"
    )
    return file


@pytest.mark.parametrize("source", ["file", "environment"])
def test_the_former_name_works_and_is_warned_about_once(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if source == "environment":
        monkeypatch.setenv(VARIABLE, "77")
    settings = load_settings(settings_file(tmp_path, ", duty_interval: 77" if source == "file" else ""))
    assert settings.evictor.assignment_interval == 77
    assert settings.evictor.partial_keep == 60
    [warning] = [record.getMessage() for record in caplog.records]
    assert FORMER in warning
    assert CURRENT in warning


def test_the_current_name_is_not_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = load_settings(settings_file(tmp_path, ", assignment_interval: 78"))
    assert settings.evictor.assignment_interval == 78
    assert not caplog.records


def test_both_names_together_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "77")
    with pytest.raises(ConfigurationError, match="duty_interval is the former name of assignment_interval"):
        load_settings(settings_file(tmp_path, ", assignment_interval: 78"))


def test_the_warning_is_one_line_on_stderr(tmp_path: Path) -> None:
    """Standard output belongs to the command: `config show` prints settings."""
    command = [sys.executable, "-m", "distributor_node.services.command_line", "config", "show"]
    done = subprocess.run(
        [*command, "--config", str(settings_file(tmp_path))],
        env={**os.environ, VARIABLE: "77"},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert "assignment_interval: 77" in done.stdout
    assert "duty_interval" not in done.stdout
    assert done.stderr.count(FORMER) == 1
    assert len(done.stderr.splitlines()) == 1
