"""The stack as `docker compose` runs it: a project, ports and passwords of its own."""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
from pathlib import Path
from typing import Any

from distributor_node.shared.settings.model import METRICS_PORTS
from tests.waiting import poll

ROOT = Path(__file__).parents[2]
PORTS = (
    "API_PORT",
    "DASHBOARD_PORT",
    "DEMO_PORT",
    "PROMETHEUS_PORT",
    "GRAFANA_PORT",
    "EDGE_PORT",
    "EDGE_TLS_PORT",
)
NODE = ("api", "fetcher", "evictor")


def free_ports(count: int) -> list[int]:
    """Different free ports; held open together while they are chosen."""
    held = [socket.socket() for _ in range(count)]
    try:
        for one in held:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in held]
    finally:
        for one in held:
            one.close()


class ComposeStack:
    """One project of the compose file with all its profiles; `settings` are what an operator writes into .env."""

    def __init__(self, folder: Path, settings: dict[str, str]) -> None:
        self.folder = folder
        self.project = f"distributor-test-{secrets.token_hex(4)}"
        self.ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
        self.settings = {
            "REDIS_PASSWORD": secrets.token_hex(12),
            "RABBITMQ_PASSWORD": secrets.token_hex(12),
            "API_ADDRESS": "127.0.0.1",
            "EDGE_ADDRESS": "127.0.0.1",
            "FETCHERS": "2",  # --scale wins
            "IMAGE_TAG": self.project,
            **{name: str(port) for name, port in self.ports.items()},
            **settings,
        }

    def compose(self, *arguments: str, check: bool = True, timeout: float = 300) -> str:
        """Run `docker compose`; its standard output. AssertionError with all it said if it fails."""
        env_file = self.folder / "env"
        env_file.write_text("".join(f"{name}={value}\n" for name, value in self.settings.items()))
        done = run(
            "docker", "compose", "--ansi", "never", "--env-file", str(env_file), "--project-name", self.project,
            "--profile", "*", *arguments, timeout=timeout,
        )  # fmt: skip
        if check and done.returncode != 0:
            raise AssertionError(f"docker compose {' '.join(arguments)}\n{done.stdout}\n{done.stderr}")
        return done.stdout

    def build(self) -> None:
        """The images, which takes as long as packages take to arrive."""
        self.compose("build", "--quiet", "api", "demo", timeout=900)

    def up(self, *arguments: str) -> None:
        """Up with three fetchers, and wait until all are healthy."""
        self.compose(
            "up",
            "--detach",
            "--wait",
            "--wait-timeout",
            "240",
            "--scale",
            "fetcher=3",
            *arguments,
            timeout=420,
        )

    def until_healthy(self, service: str, timeout: float = 120) -> None:
        """Wait until Docker says so of each of the service's containers."""

        def healthy() -> bool:
            ids = self.compose("ps", "--quiet", service).split()
            said = run("docker", "inspect", "--format", "{{.State.Health.Status}}", *ids).stdout.split()
            return bool(said) and set(said) == {"healthy"}

        poll(healthy, timeout, what=f"{service} is healthy")

    def down(self) -> None:
        """Containers and networks go, volumes stay."""
        self.compose("down", "--timeout", "40")

    def remove(self) -> None:
        """All of it, volumes and image included."""
        self.compose("down", "--volumes", "--remove-orphans", "--timeout", "5", check=False)
        for image in ("distributor-node", "distributor-node-demo"):
            run("docker", "image", "rm", "--force", f"{image}:{self.project}")

    def containers(self) -> list[dict[str, Any]]:
        """What the engine says of each container (`docker inspect`)."""
        ids = self.compose("ps", "--quiet", "--all").split()
        found: list[dict[str, Any]] = json.loads(run("docker", "inspect", *ids).stdout)
        return found

    def exec(self, service: str, *command: str, index: int = 1) -> str:
        return self.compose("exec", "--no-TTY", "--index", str(index), service, *command)

    def metrics(self, service: str, index: int = 1) -> str:
        """What one container shows to Prometheus."""
        port = METRICS_PORTS[service]
        script = (
            "import urllib.request as u, sys;"
            f"sys.stdout.write(u.urlopen('http://127.0.0.1:{port}/metrics', timeout=9).read().decode())"
        )
        return self.exec(service, "python3", "-c", script, index=index)

    def url(self, object_id: str) -> str:
        return f"http://127.0.0.1:{self.ports['API_PORT']}/api/v1/assets/{object_id}"

    def edge_url(self, path: str) -> str:
        """`path` below the edge's prefix."""
        return f"http://127.0.0.1:{self.ports['EDGE_PORT']}{self.settings['EDGE_PREFIX']}{path}"

    def log_of(self, service: str) -> str:
        """What the service's containers wrote, as they wrote it."""
        ids = self.compose("ps", "--quiet", "--all", service).split()
        written = [run("docker", "logs", one) for one in ids]
        return "".join(one.stdout + one.stderr for one in written)

    def logs(self) -> str:
        return self.compose("logs", "--no-color", "--tail", "60", check=False)


def run(*command: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Run a command in the project's directory. The environment of the caller does not reach the compose file."""
    kept = (
        "PATH",
        "HOME",
        "DOCKER_HOST",
        "DOCKER_CONFIG",
        "DOCKER_CERT_PATH",
        "DOCKER_TLS_VERIFY",
        "DOCKER_CONTEXT",
    )
    environment = {name: value for name, value in os.environ.items() if name in kept}
    return subprocess.run(
        command, cwd=ROOT, env=environment, check=False, capture_output=True, text=True, timeout=timeout
    )


def samples(page: str, name: str) -> dict[str, float]:
    """The series of one metric on a page of metrics: labels as written, and value."""
    found = {}
    for line in page.splitlines():
        series, _, value = line.rpartition(" ")
        if series == name or series.startswith(name + "{"):
            found[series.removeprefix(name)] = float(value)
    return found
