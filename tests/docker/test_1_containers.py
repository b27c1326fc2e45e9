"""Users, contents and limits of the containers. The files of this folder run in the order of their names, on one
stack."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from tests.docker.compose import NODE, ROOT, run
from tests.docker.harness import NOTES, Harness

OF_THE_TESTS = {
    "DISTRIBUTOR_PUBLIC_API__FIRST_BYTE_WAIT",
    "DISTRIBUTOR_EVICTOR__MIN_IDLE",
    "DISTRIBUTOR_OPERATOR_API__SECRET",
}
"""Settings from a file as SETTINGS_FILE names it."""

pytestmark = pytest.mark.docker


def test_all_are_healthy_and_fetchers_are_three(harness: Harness) -> None:
    containers = harness.stack.containers()
    services = [container["Config"]["Labels"]["com.docker.compose.service"] for container in containers]
    assert sorted(services) == sorted(
        [
            "api",
            "demo",
            "edge",
            "evictor",
            "fetcher",
            "fetcher",
            "fetcher",
            "grafana",
            "prometheus",
            "rabbitmq",
            "redis",
        ]
    )
    assert {container["State"]["Health"]["Status"] for container in containers} == {"healthy"}
    assert {container["RestartCount"] for container in containers} == {0}


def test_no_container_is_root_or_can_write_to_its_image(harness: Harness) -> None:
    for container in harness.stack.containers():
        name, host = container["Name"], container["HostConfig"]
        assert host["ReadonlyRootfs"] is True, name
        assert host["CapDrop"] == ["ALL"], name
        assert host["Privileged"] is False, name
        assert "no-new-privileges:true" in host["SecurityOpt"], name
        assert host["LogConfig"]["Config"]["max-size"], name
        assert host["Memory"] > 0, name
        assert (
            harness.stack.exec(
                container["Config"]["Labels"]["com.docker.compose.service"], "id", "-u"
            ).strip()
            != "0"
        ), name


@pytest.mark.parametrize("service", NODE)
def test_our_containers_seen_from_inside(harness: Harness, service: str) -> None:
    script = (
        "id -u; for place in / /opt/distributor /etc /usr/local; do"
        " touch $place/written 2>/dev/null && echo wrote $place; done; grep CapEff /proc/1/status; ulimit -n; exit 0"
    )
    user, capabilities, files = harness.stack.exec(service, "sh", "-c", script).splitlines()
    assert (user, capabilities.split()[1], files) == ("10001", "0" * 16, "20000")
    if service == "api":
        reached = harness.stack.exec(service, "sh", "-c", "touch /var/lib/distributor/written 2>&1; exit 0")
        assert "Read-only file system" in reached


def test_the_image_is_lean_and_as_large_as_the_readme_says(harness: Harness) -> None:
    image = f"distributor-node:{harness.stack.project}"
    found = harness.stack.exec(
        "api", "sh", "-c", "for tool in gcc cc g++ make git pip pip3; do command -v $tool; done; exit 0"
    )
    # The base image may bring a pip of its own; ours has none.
    assert not set(found.split()) - {"/usr/local/bin/pip", "/usr/local/bin/pip3"}
    history = run("docker", "history", "--no-trunc", "--format", "{{.Size}} {{.CreatedBy}}", image).stdout
    ours = [line for line in history.splitlines() if "/opt/distributor" in line and line[0] != "0"]
    megabytes = [float(re.match(r"([0-9.]+)MB", line)[1]) for line in ours]  # type: ignore[index]
    stated = re.search(r"adds (\d+) MB to `python:3\.12-slim`", (ROOT / "docs" / "deployment.md").read_text())
    assert stated is not None
    assert len(megabytes) == 1
    assert abs(megabytes[0] - int(stated[1])) < 8
    whole, base = (
        int(run("docker", "image", "inspect", "--format", "{{.Size}}", name).stdout) / 1e6
        for name in (image, "python:3.12-slim")
    )
    NOTES.append(f"image: {whole:.0f} MB, {base:.0f} MB of them the base")
    assert whole - base < int(stated[1]) + 8
    in_all = re.search(
        r"(\d+) MB in all with the official one's (\d+)", (ROOT / "docs" / "deployment.md").read_text()
    )
    assert in_all is not None
    assert int(in_all[1]) - int(in_all[2]) == int(stated[1])


def test_the_fast_path_is_compiled(harness: Harness) -> None:
    code = "import {0} as module; print(module.__file__)"
    for module in ("services.api.fast_path.protocol", "shared.domain.conditionals"):
        file = harness.stack.exec("api", "python3", "-c", code.format(f"distributor_node.{module}"))
        assert file.strip().endswith(".so")


def test_redis_keeps_a_log_and_no_snapshots(harness: Harness) -> None:
    asked = (
        'REDISCLI_AUTH="$REDIS_PASSWORD" redis-cli -h 127.0.0.1 config get save appendonly maxmemory-policy'
    )
    said = harness.stack.exec("redis", "sh", "-c", asked).split("\n")
    settings = dict(zip(said[::2], said[1::2], strict=False))
    assert settings == {"save": "", "appendonly": "yes", "maxmemory-policy": "noeviction"}


def test_the_tested_image_is_the_shipped_one(harness: Harness) -> None:
    """The stack as these tests run it, beside `docker compose --profile demo` with nothing but passwords set."""
    env_file = harness.stack.folder / "shipped"
    example = (ROOT / ".env.example").read_text()
    env_file.write_text(example.replace("_PASSWORD=\n", "_PASSWORD=abc\n"))
    command = (
        "docker",
        "compose",
        "--env-file",
        str(env_file),
        "--profile",
        "demo",
        "config",
        "--format",
        "json",
    )
    shipped = json.loads(run(*command).stdout)["services"]
    tested = json.loads(harness.stack.compose("config", "--format", "json"))["services"]
    assert set(shipped) == {"api", "fetcher", "evictor", "redis", "rabbitmq", "prometheus", "demo"}
    for name, service in shipped.items():
        assert _of_the_file(service) == _of_the_file(tested[name]), name


def _of_the_file(service: dict[str, Any]) -> dict[str, Any]:
    """All that an operator's variables do not set."""
    kept = {
        field: value
        for field, value in service.items()
        if field not in {"image", "scale", "ports", "command"}
    }
    kept["environment"] = sorted(service.get("environment", {}).keys() - OF_THE_TESTS)
    kept["volumes"] = [volume["target"] for volume in service.get("volumes", [])]
    return kept


def test_the_configuration_holds_no_secret_of_its_own(harness: Harness) -> None:
    env_file = harness.stack.folder / "without-passwords"
    env_file.write_text("")
    refused = run("docker", "compose", "--env-file", str(env_file), "config")
    assert refused.returncode != 0
    assert "PASSWORD is missing a value" in refused.stderr
    shown = harness.stack.compose("config")
    passwords = {harness.stack.settings[name] for name in ("REDIS_PASSWORD", "RABBITMQ_PASSWORD")}
    passwords.add(harness.secret)
    for line in shown.splitlines():
        if re.search(r"password|secret|token", line, re.IGNORECASE) and "GF_" not in line:
            assert any(password in line for password in passwords) or "$$REDIS_PASSWORD" in line, line


def test_redis_and_rabbitmq_are_reached_from_inside_alone(harness: Harness) -> None:
    for container in harness.stack.containers():
        service = container["Config"]["Labels"]["com.docker.compose.service"]
        published = {port for port, bound in container["NetworkSettings"]["Ports"].items() if bound}
        if service in {"redis", "rabbitmq", "fetcher", "evictor"}:
            assert not published, service
        else:
            addresses = {
                bound["HostIp"] for port in published for bound in container["NetworkSettings"]["Ports"][port]
            }
            assert addresses == {"127.0.0.1"}, service


def test_logs_are_json_and_hold_no_password(harness: Harness) -> None:
    logs = "".join(harness.stack.log_of(service) for service in NODE)
    lines = [line for line in logs.splitlines() if line.strip()]
    assert len(lines) > 10
    assert [line for line in lines if not line.startswith("{")] == []
    assert not any(harness.stack.settings[name] in logs for name in ("REDIS_PASSWORD", "RABBITMQ_PASSWORD"))
    assert harness.secret not in logs
