"""docker-compose.yml as text: hardened, scalable, without default secrets, portable."""

from __future__ import annotations

import json
import re
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from distributor_node.shared.settings.model import METRICS_PORTS

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docker-compose.yml").read_text()
FILE: dict[str, Any] = yaml.safe_load(TEXT)
SERVICES: dict[str, dict[str, Any]] = FILE["services"]
NODE = ("api", "fetcher", "evictor")
VOLUME = "/var/lib/distributor"
UID = "10001:10001"
# By the first place in the file where each stands.
DEFAULTS = dict(reversed(re.findall(r"\$\{([A-Z_]+):-([^}]*)\}", TEXT)))
EDGE_TEMPLATE = (ROOT / "deploy" / "edge" / "distributor.conf.template").read_text()
EDGE_START = (ROOT / "deploy" / "edge" / "start.sh").read_text()


MEDIA = f"${{MEDIA_DIRECTORY:-media}}:{VOLUME}"
"""In the short form, in which a name is a volume and a path is a directory of the machine."""


def mounts(service: str) -> dict[str, dict[str, Any]]:
    return {mount["target"]: mount for mount in map(long_form, SERVICES[service]["volumes"])}


def long_form(mount: str | dict[str, Any]) -> dict[str, Any]:
    if isinstance(mount, dict):
        return mount
    assert mount in {MEDIA, f"{MEDIA}:ro"}
    return {"type": "media", "target": VOLUME, "read_only": mount.endswith(":ro")}


def test_the_services() -> None:
    assert set(SERVICES) >= {*NODE, "rabbitmq", "redis", "prometheus", "demo"}
    assert SERVICES["demo"]["profiles"] == ["demo"]


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_is_hardened(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["restart"] == "unless-stopped"
    assert service["ulimits"]["nofile"]["hard"] <= 20_000
    assert "max-size" in service["logging"]["options"]
    assert service["mem_limit"].startswith("${")
    assert "stop_grace_period" in service
    assert "privileged" not in service
    assert service.get("user", "nobody") not in {"root", "0", "0:0"}


def test_our_containers_share_one_user_which_is_the_image_s() -> None:
    assert {SERVICES[name]["user"] for name in (*NODE, "demo")} == {UID}
    assert f"USER {UID}" in (ROOT / "Dockerfile").read_text()


def test_the_volume_is_shared_and_read_only_for_the_api() -> None:
    assert {mounts(name)[VOLUME]["type"] for name in NODE} == {"media"}
    assert mounts("api")[VOLUME]["read_only"] is True
    assert not any(mounts(name)[VOLUME]["read_only"] for name in ("fetcher", "evictor"))
    assert "media" in FILE["volumes"]


def test_fetchers_can_be_scaled() -> None:
    # By a variable, so that the next `up` does not undo it.
    assert SERVICES["fetcher"]["scale"] == "${FETCHERS:-1}"
    assert "ports" not in SERVICES["fetcher"]
    assert not any(
        "container_name" in service or "hostname" in service for service in map(SERVICES.get, NODE) if service
    )


def test_services_wait_for_healthy_servers() -> None:
    for name in NODE:
        conditions = {what: how["condition"] for what, how in SERVICES[name]["depends_on"].items()}
        assert conditions == {"redis": "service_healthy", "rabbitmq": "service_healthy"}
    for name in ("redis", "rabbitmq", "prometheus"):
        assert SERVICES[name]["healthcheck"]["test"]


def test_no_name_that_means_two_addresses() -> None:
    checks = [str(service.get("healthcheck", "")) for service in SERVICES.values()]
    assert not any("localhost" in text for text in (*checks, (ROOT / "Dockerfile").read_text()))


def test_redis_keeps_what_it_is_told() -> None:
    assert "--appendonly yes" in SERVICES["redis"]["command"][-1]
    assert mounts("redis")["/data"]["source"] == "redis"


def test_stores_are_on_an_internal_network_without_published_ports() -> None:
    assert FILE["networks"]["inside"]["internal"] is True
    for name in ("redis", "rabbitmq"):
        assert SERVICES[name]["networks"] == ["inside"]
        assert "ports" not in SERVICES[name]


def test_the_name_fetcher_gives_prometheus_one_address_a_worker() -> None:
    shared = set(SERVICES["prometheus"]["networks"]) & set(SERVICES["fetcher"]["networks"])
    assert shared == {"inside"}


def test_secrets_have_no_default() -> None:
    secrets = re.findall(r"\$\{([A-Z_]*PASSWORD[A-Z_]*)([^}]*)\}", TEXT)
    assert secrets
    assert all(rest.startswith(":?") for _, rest in secrets)


def test_every_variable_is_documented_and_has_its_default_there() -> None:
    example = (ROOT / ".env.example").read_text()
    for name, default in DEFAULTS.items():
        if not name.startswith(("COMPOSE_", "RABBITMQ_USER", "IMAGE_", "LOG_MAX")):
            assert f"#{name}={default}\n" in example, name


def test_bind_mounts_and_build_files_exist() -> None:
    for name in SERVICES:
        for mount in mounts(name).values():
            if mount["type"] == "bind":
                source = re.sub(r"\$\{[A-Z_]+:-([^}]*)\}", r"\1", mount["source"])
                assert (ROOT / source).exists(), source


def test_images_are_tagged_and_the_dockerfile_needs_no_frontend() -> None:
    for service in SERVICES.values():
        assert re.search(r":[A-Za-z0-9$]", service["image"])
        assert "@sha256" not in service["image"]
        assert not service["image"].endswith(":latest")
        assert "pull_policy" not in service
    assert "# syntax=" not in (ROOT / "Dockerfile").read_text()


def pinned_images() -> set[str]:
    """Those that are pulled: of the compose file, and what ours is built from."""
    pulled = {service["image"] for service in SERVICES.values() if "build" not in service}
    return pulled | set(re.findall(r"^FROM (\S+:\S+)", (ROOT / "Dockerfile").read_text(), re.MULTILINE))


def test_images_are_pinned_to_a_minor_release_at_least() -> None:
    """A floating major may jump to a release that does not open the volume of the one before."""
    for image in pinned_images():
        assert re.search(r":v?\d+\.\d+", image), image


def test_the_pinned_images_are_listed_with_their_reasons() -> None:
    rows = re.findall(r"^\| `([^`]+:[^`]+)` \|", (ROOT / "docs" / "upgrading.md").read_text(), re.MULTILINE)
    assert set(rows) == pinned_images()


def test_renovate_lets_the_pinned_versions_in() -> None:
    """Its rules name images that are used, and the versions they allow include the ones of today."""
    rules = json.loads((ROOT / "renovate.json").read_text())["packageRules"]
    ours = {"distributor-node:local", "distributor-node-demo:local"}
    images = dict(image.split(":") for image in pinned_images() | ours)
    for rule in rules:
        for name in rule.get("matchPackageNames", []):
            assert name in images, name
            allowed = rule.get("allowedVersions", "/.*/").strip("/")
            assert re.search(allowed, images[name]), name


def test_the_demos_manifests_differ_only_in_their_urls() -> None:
    demo = ROOT / "deploy" / "demo"
    here, composed = (
        yaml.safe_load((demo / name).read_text()) for name in ("manifest.yaml", "manifest.compose.yaml")
    )
    assert composed.pop("base_urls") == ["http://demo:3390/api/v1/files/"]
    here.pop("base_urls")
    assert here == composed


def test_prometheus_finds_every_service() -> None:
    config = yaml.safe_load((ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text())
    by_dns = {
        name: discovery["port"]
        for job in config["scrape_configs"]
        for discovery in job.get("dns_sd_configs", [])
        for name in discovery["names"]
    }
    assert by_dns == {name: METRICS_PORTS[name] for name in NODE}
    assert "rabbitmq:15692" in str(config["scrape_configs"])


def test_passwords_are_made_once(tmp_path: Path) -> None:
    made = tmp_path / ".env"
    command = [ROOT / "deploy" / "environment" / "make-passwords.sh", ROOT / ".env.example", made]
    subprocess.run(command, check=True, capture_output=True)
    first = made.read_text()
    passwords = re.findall(r"^[A-Z]+_PASSWORD=([0-9a-f]{48})$", first, re.MULTILINE)
    assert len(set(passwords)) == 2
    assert stat.S_IMODE(made.stat().st_mode) == 0o600
    subprocess.run(command, check=True, capture_output=True)
    assert made.read_text() == first


def test_the_edge_reads_the_volume_as_the_nodes_user_and_cannot_write_it() -> None:
    assert SERVICES["edge"]["user"] == UID
    assert mounts("edge")[VOLUME] == mounts("api")[VOLUME]
    assert "inside" not in SERVICES["edge"]["networks"]


def test_the_edge_is_given_every_variable_of_its_template() -> None:
    """Or start.sh makes it of others; and every setting that is given is used by one of the two."""
    asked = set(re.findall(r"\$\{([A-Z_]+)\}", EDGE_TEMPLATE))
    made = set(re.findall(r"^\s*(EDGE_[A-Z_]+)=", EDGE_START, re.MULTILINE))
    given = set(SERVICES["edge"]["environment"])
    assert asked <= given | made
    assert all(name in EDGE_START or name in asked for name in given)


def test_monitoring_ports_are_local_only() -> None:
    for name in ("prometheus", "grafana", "demo"):
        assert all(port.startswith("127.0.0.1:") for port in SERVICES[name]["ports"]), name


def test_redis_refuses_before_it_is_killed() -> None:
    """Writes during a rewrite of its log are in memory twice, which maxmemory does not count."""
    data, memory = (size_of(DEFAULTS[name]) for name in ("REDIS_MAX_DATA", "REDIS_MEMORY"))
    assert 2 * data < memory
    assert '--save ""' in SERVICES["redis"]["command"][-1]


def size_of(text: str) -> int:
    return int(text.rstrip("mgb")) * (1024 if text.endswith("g") else 1)


def test_a_service_exits_before_it_is_killed() -> None:
    """After the deadline it takes up to five seconds to cancel what is left (shared/runtime/run_service.py)."""
    grace, deadline = int(DEFAULTS["STOP_GRACE_PERIOD"].rstrip("s")), int(DEFAULTS["SHUTDOWN_DEADLINE"])
    assert grace > deadline + 5
    assert {SERVICES[name]["stop_grace_period"] for name in (*NODE, "edge")} == {
        f"${{STOP_GRACE_PERIOD:-{grace}s}}"
    }


def test_the_edge_waits_longer_than_a_replacement_of_the_api_can_take() -> None:
    start = 30  # seconds, on a busy machine
    grace = int(DEFAULTS["STOP_GRACE_PERIOD"].rstrip("s"))
    attempts = EDGE_TEMPLATE.count("server unix:/tmp/attempt.sock")
    (timeout,) = re.findall(r"proxy_next_upstream_timeout (\d+)s;\n\s+proxy_set_header Host", EDGE_TEMPLATE)
    assert "rate=1r/s" in EDGE_TEMPLATE
    assert int(timeout) >= attempts >= grace + start


def test_the_edges_workers_fit_into_its_memory() -> None:
    configuration = (ROOT / "deploy" / "edge" / "nginx.conf").read_text()
    assert "worker_processes" not in configuration
    assert "worker_processes $(number EDGE_WORKERS 2);" in EDGE_START
    (connections,) = re.findall(r"worker_connections (\d+);", configuration)
    assert int(DEFAULTS["EDGE_WORKERS"]) * int(connections) / 2 * 120 / 1024 < size_of(
        DEFAULTS["EDGE_MEMORY"]
    )


def test_hits_are_accel_redirected_with_the_configured_prefix() -> None:
    prefix = SERVICES["evictor"]["environment"]["DISTRIBUTOR_PUBLIC_API__ACCEL_REDIRECT_PREFIX"]
    assert prefix == "${ACCEL_REDIRECT_PREFIX:-}"
    assert SERVICES["edge"]["environment"]["EDGE_OBJECTS_PREFIX"] == "${ACCEL_REDIRECT_PREFIX:-/_objects}"
    assert "location ${EDGE_OBJECTS_PREFIX}/ {" in EDGE_TEMPLATE


def test_settings_that_the_file_of_settings_cannot_change_are_named() -> None:
    example = (ROOT / ".env.example").read_text()
    named = set(re.findall(r"DISTRIBUTOR_[A-Z_]+", example[example.index("have no effect there") :]))
    assert named == {
        name for one in NODE for name in SERVICES[one]["environment"] if name.startswith("DISTRIBUTOR_")
    }


def test_every_file_of_rabbitmq_s_is_used() -> None:
    folder = ROOT / "deploy" / "rabbitmq"
    mounted = {mount["source"] for mount in mounts("rabbitmq").values()}
    assert {f"./deploy/rabbitmq/{path.name}" for path in folder.iterdir()} <= mounted


def test_the_node_s_page_is_for_this_machine_alone() -> None:
    assert "127.0.0.1:${DASHBOARD_PORT:-3336}:3336" in SERVICES["api"]["ports"]
    assert all(
        ":3336" not in str(service.get("ports")) for name, service in SERVICES.items() if name != "api"
    )
