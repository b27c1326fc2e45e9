"""The console command: settings are checked, shown without secrets, and documented."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from distributor_node.services.command_line.config import render_reference
from distributor_node.services.command_line.main import app
from distributor_node.shared.domain.errors import ConfigurationError
from distributor_node.shared.settings import Settings, load_settings
from distributor_node.shared.settings.load import check_settings

ROOT = Path(__file__).parents[2]


def distributor(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "distributor_node.services.command_line", *arguments],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", **environment},
        check=False,
        capture_output=True,
        text=True,
        timeout=30,
    )


@pytest.fixture
def settings_file(tmp_path: Path) -> Path:
    file = tmp_path / "settings.yaml"
    file.write_text(
        "catalog: {kind: origin, origin: 'https://reader:hunter2@site.example/{id}'}\n"
        "state_store: {url: 'redis://:hunter2@store.example/0'}\n"
        "job_queue: {url: 'amqp://node:hunter2@queue.example/'}\n"
        "storage: {limit: 500G}\n"
    )
    return file


@pytest.mark.parametrize("command", ["standalone", "api", "fetcher", "evictor"])
def test_every_service_takes_a_settings_file(command: str) -> None:
    result = CliRunner().invoke(app, [command, "--help"], env={"NO_COLOR": "1", "COLUMNS": "120"})
    assert result.exit_code == 0
    assert "--config" in result.output


def test_help_imports_no_service() -> None:
    script = (
        "import sys; import distributor_node.services.command_line.main;"
        " print([m for m in ('sanic', 'aio_pika', 'redis', 'httpx')"
        " if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert done.stdout.strip() == "[]"


def test_check_says_yes(settings_file: Path) -> None:
    done = distributor("config", "check", "--config", str(settings_file))
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("command", [("config", "check"), ("config", "show"), ("api",), ("standalone",)])
def test_wrong_settings_are_a_clear_message_and_exit_code_2(
    command: tuple[str, ...], settings_file: Path
) -> None:
    done = distributor(*command, "--config", str(settings_file), DISTRIBUTOR_FETCH__LEASE="5")
    assert done.returncode == 2
    assert "fetch.lease (5 s) must be at least twice fetch.lease_renewal" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_settings_file_that_is_not_there(tmp_path: Path) -> None:
    done = distributor("config", "check", "--config", str(tmp_path / "none.yaml"))
    assert done.returncode == 2
    assert "none.yaml cannot be read" in done.stderr


def test_show_is_a_settings_file_without_secrets(settings_file: Path) -> None:
    done = distributor(
        "config", "show", "--config", str(settings_file), DISTRIBUTOR_STORAGE__HIGH_WATERMARK="0.97"
    )
    shown = yaml.safe_load(done.stdout)
    assert shown["storage"]["limit"] == "500G"
    assert shown["storage"]["high_watermark"] == 0.97
    assert "hunter2" not in done.stdout


def test_the_configuration_reference_is_up_to_date() -> None:
    assert (ROOT / "docs" / "configuration.md").read_text() == render_reference(), "run: make reference"


def test_every_setting_has_a_meaning() -> None:
    rows = [line for line in render_reference().splitlines() if line.startswith("| `")]
    assert len(rows) > 40
    assert not [row for row in rows if row.endswith("|  |")]


def test_a_documented_variable_takes_effect(settings_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTRIBUTOR_PUBLIC_API__PORT", "4000")
    settings: Settings = load_settings(settings_file)
    assert settings.public_api.port == 4000


@pytest.mark.parametrize(
    ("section", "name", "value", "told"),
    [
        ("state_store", "operation_timeout", 10, "must be less than evictor.leadership (10 s)"),
        ("state_store", "operation_timeout", 15, "must be less than fetch.lease (15 s)"),
        ("job_queue", "publish_timeout", 10, "job_queue.publish_timeout (10 s) must be less than 10 s"),
        ("evictor", "min_idle", 0.5, "greater than or equal to 1"),
    ],
)
def test_time_limits_that_defeat_each_other_are_refused(
    section: str, name: str, value: float, told: str
) -> None:
    fields = {section: {name: value}, "catalog": {"kind": "manifest", "manifest": "m.yaml"}}
    with pytest.raises(ConfigurationError, match=re.escape(told)):
        check_settings(fields)
