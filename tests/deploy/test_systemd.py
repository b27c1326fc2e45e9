"""deploy/systemd: units that systemd accepts, and that agree with the rest of the deployment."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from distributor_node.shared.settings.model import METRICS_PORTS

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "systemd"
SERVICES = sorted(path.stem for path in FOLDER.glob("*.service"))
SOCKETS = sorted(path.stem for path in FOLDER.glob("*.socket"))
COMMON = (FOLDER / "distributor-.service.d" / "10-common.conf").read_text()
needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze here")


def settings(text: str) -> dict[str, list[str]]:
    """Values by name, in order; sections do not matter here."""
    found: dict[str, list[str]] = {}
    for name, value in re.findall(r"^(\w+)=(.*)$", text, re.MULTILINE):
        found.setdefault(name, []).append(value)
    return found


def unit(name: str) -> dict[str, list[str]]:
    return settings((FOLDER / name).read_text())


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """The units, with a program that exists."""
    shutil.copytree(FOLDER, tmp_path / "units")
    for path in (tmp_path / "units").glob("*.service"):
        path.write_text(
            path.read_text().replace("/opt/distributor/bin/distributor", shutil.which("true") or "")
        )
    return tmp_path / "units"


def analyze(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["systemd-analyze", *arguments],
        cwd=folder, check=False, capture_output=True, text=True, timeout=30,
        env={"SYSTEMD_UNIT_PATH": f"{folder}:", "PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@needs_systemd
@pytest.mark.parametrize(
    "name", [*(f"{one}.service" for one in SERVICES), *(f"{one}.socket" for one in SOCKETS)]
)
def test_systemd_accepts_it(installed: Path, name: str) -> None:
    assert str(installed) not in analyze(installed, "verify", f"./{name}")


@needs_systemd
@pytest.mark.parametrize("name", SERVICES)
def test_it_is_exposed_to_little(installed: Path, name: str) -> None:
    """systemd's own measure, from 0 (nothing) to 10; an ordinary service has 9.6."""
    analyze(installed, "security", "--offline=true", "--threshold=20", "--no-pager", f"./{name}.service")


def test_there_is_a_unit_for_each_command_that_serves() -> None:
    assert {"distributor-api", "distributor-evictor", "distributor-fetcher", "distributor-standalone"} == set(
        SERVICES
    )
    for name in SERVICES:
        command = name.removeprefix("distributor-")
        wanted = f"/opt/distributor/bin/distributor {command} --config /etc/distributor/settings.yaml"
        assert unit(f"{name}.service")["ExecStart"] == [wanted]
        assert unit(f"{name}.service")["Type"] == ["notify"]


def test_public_ports_outlive_their_process() -> None:
    assert SOCKETS == ["distributor-api", "distributor-standalone"]
    for name in SOCKETS:
        assert unit(f"{name}.socket")["FileDescriptorName"] == ["public_api"]
        assert unit(f"{name}.socket")["ListenStream"] == ["[::]:3334"]
        assert f"{name}.socket" in unit(f"{name}.service")["Requires"]


def test_one_machine_has_room_for_all_services() -> None:
    services = ("api", "fetcher", "evictor")
    assert len({METRICS_PORTS[name] for name in services}) == len(services)
    texts = [COMMON, *((FOLDER / f"distributor-{name}.service").read_text() for name in services)]
    assert not any("METRICS__PORT" in text for text in texts)


def test_limits_are_those_of_the_containers() -> None:
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    common = settings(COMMON)
    assert common["LimitNOFILE"] == [str(compose["x-hardened"]["ulimits"]["nofile"]["hard"])]
    assert common["TasksMax"] == [str(compose["x-hardened"]["pids_limit"])]


def test_all_that_is_written_has_a_directory_of_its_own() -> None:
    """The rest of the file system is read-only for the node."""
    common = settings(COMMON)
    assert common["ProtectSystem"] == ["strict"]
    assert (common["StateDirectory"], common["LogsDirectory"]) == (["distributor"], ["distributor"])
    assert "`/var/log/distributor`" in (ROOT / "docs" / "systemd.md").read_text()


def test_a_service_ends_itself_before_it_is_killed() -> None:
    deadline = 30  # DISTRIBUTOR_SHUTDOWN_DEADLINE's default
    assert int(settings(COMMON)["TimeoutStopSec"][0]) > deadline + 5
    assert settings(COMMON)["RestartPreventExitStatus"] == ["2"]
