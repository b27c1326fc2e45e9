"""deploy/kubernetes/fleet: the cells agree with their settings, with each other and with the base."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from distributor_node.shared.settings import load_settings
from distributor_node.shared.settings.model import METRICS_PORTS, Settings

FOLDER = Path(__file__).parents[2] / "deploy" / "kubernetes" / "fleet"
BASE = FOLDER.parent / "base"
RESOURCES: list[dict[str, Any]] = list(yaml.safe_load_all((FOLDER / "cells.yaml").read_text()))
CELLS = next(one for one in RESOURCES if one["kind"] == "StatefulSet")
POD: dict[str, Any] = CELLS["spec"]["template"]["spec"]
CONTAINERS: dict[str, dict[str, Any]] = {one["name"]: one for one in POD["containers"]}
COMPONENTS = ("api", "fetcher", "evictor")
PEERS_PORT = 3337


def service(name: str) -> dict[str, Any]:
    (found,) = [one for one in RESOURCES if (one["kind"], one["metadata"]["name"]) == ("Service", name)]
    return found


def settings_of(cell: str) -> Settings:
    """As the containers of one cell read them."""
    lines = (FOLDER / "settings.env").read_text().splitlines()
    given = dict(line.split("=", 1) for line in lines)
    for one in CONTAINERS["api"]["env"]:
        if "value" in one:
            given[one["name"]] = one["value"].replace("$(POD_NAME)", cell)
    return load_settings(None, given)


def test_each_cell_is_one_of_the_peers_by_a_name_that_stays() -> None:
    count = CELLS["spec"]["replicas"]
    name, governing = CELLS["metadata"]["name"], CELLS["spec"]["serviceName"]
    assert service(governing)["spec"]["clusterIP"] == "None"
    assert service(governing)["spec"]["publishNotReadyAddresses"] is True
    known = [f"http://{name}-{number}.{governing}:{PEERS_PORT}" for number in range(count)]
    for number in range(count):
        rules = settings_of(f"{name}-{number}").peers.rules
        assert rules is not None
        assert rules.own == known[number]
        assert sorted(rules.urls) == known


def test_cells_ask_each_other_at_a_port_that_no_client_reaches() -> None:
    settings = settings_of("distributor-cell-0")
    assert settings.peers.port == PEERS_PORT != settings.public_api.port
    ports = {one["name"]: one["containerPort"] for one in CONTAINERS["api"]["ports"]}
    assert (ports["http"], ports["peers"]) == (settings.public_api.port, PEERS_PORT)
    assert service("distributor-cells")["spec"]["ports"] == [
        {"name": "peers", "port": PEERS_PORT, "targetPort": "peers"}
    ]
    assert {one["targetPort"] for one in service("distributor-fleet")["spec"]["ports"]} == {"http"}
    ingress = yaml.safe_load((FOLDER / "network-policies.yaml").read_text())["spec"]["ingress"]
    (rule,) = [one for one in ingress if "peers" in [port["port"] for port in one["ports"]]]
    assert rule == {
        "from": [{"podSelector": {"matchLabels": CELLS["spec"]["selector"]["matchLabels"]}}],
        "ports": [{"protocol": "TCP", "port": "peers"}],
    }


def test_cells_that_share_redis_and_rabbitmq_do_not_share_keys_and_queues() -> None:
    one, other = settings_of("distributor-cell-0"), settings_of("distributor-cell-1")
    assert one.state_store.prefix != other.state_store.prefix
    assert one.job_queue.prefix != other.job_queue.prefix
    assert one.id != other.id


def test_a_cell_is_a_whole_node_around_a_volume_of_its_own() -> None:
    assert tuple(CONTAINERS) == COMPONENTS
    (claim,) = CELLS["spec"]["volumeClaimTemplates"]
    assert claim["spec"]["accessModes"] == ["ReadWriteOnce"]
    settings = settings_of("distributor-cell-0")
    for name, container in CONTAINERS.items():
        assert container["args"] == [name]
        mounts = {mount["name"]: mount for mount in container["volumeMounts"]}
        assert mounts[claim["metadata"]["name"]]["mountPath"] == str(settings.storage.path)
        assert mounts["media"].get("readOnly", False) is (name == "api")
        assert settings.peers.secret_file is not None
        assert mounts["peers"]["mountPath"] == str(settings.peers.secret_file.parent)
    assert settings.public_api.follow_growing_files is True
    asked = claim["spec"]["resources"]["requests"]["storage"]
    assert settings.storage.limit < int(asked.removesuffix("Gi")) * 1024**3


@pytest.mark.parametrize("component", COMPONENTS)
def test_containers_are_hardened_and_probed_as_those_of_the_base(component: str) -> None:
    container = CONTAINERS[component]
    (deployment,) = [
        one
        for one in yaml.safe_load_all((BASE / f"{component}.yaml").read_text())
        if one["kind"] == "Deployment"
    ]
    (like,) = deployment["spec"]["template"]["spec"]["containers"]
    for field in ("image", "securityContext", "resources", "lifecycle"):
        assert container.get(field) == like.get(field)
    port = f"metrics-{component}"
    assert {one["name"]: one["containerPort"] for one in container["ports"]}[port] == METRICS_PORTS[component]
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        expected = like[probe] | {"httpGet": {**like[probe]["httpGet"], "port": port}}
        assert container[probe] == expected
    for field in ("securityContext", "automountServiceAccountToken", "enableServiceLinks"):
        assert POD[field] == deployment["spec"]["template"]["spec"][field]
    assert POD["terminationGracePeriodSeconds"] > 5 + settings_of("distributor-cell-0").shutdown_deadline


def test_selectors_select_the_cells() -> None:
    labels = CELLS["spec"]["template"]["metadata"]["labels"]
    assert CELLS["spec"]["selector"]["matchLabels"] == labels
    budget = next(one for one in RESOURCES if one["kind"] == "PodDisruptionBudget")
    assert budget["spec"]["selector"]["matchLabels"] == labels
    assert budget["spec"]["maxUnavailable"] == 1
    (spread,) = POD["topologySpreadConstraints"]
    assert spread["labelSelector"]["matchLabels"] == labels
    assert all(
        service(name)["spec"]["selector"] == labels for name in ("distributor-cells", "distributor-fleet")
    )
    policy = yaml.safe_load((FOLDER / "network-policies.yaml").read_text())
    assert policy["spec"]["podSelector"]["matchLabels"] == labels


def test_prometheus_takes_each_cell_for_a_node_and_each_container_for_a_job() -> None:
    monitors = yaml.safe_load_all((FOLDER.parent / "monitoring" / "monitors.yaml").read_text())
    (monitor,) = [one["spec"] for one in monitors if one["metadata"]["name"] == "distributor-cells"]
    assert monitor["selector"]["matchLabels"] == CELLS["spec"]["selector"]["matchLabels"]
    assert [one["port"] for one in monitor["podMetricsEndpoints"]] == [
        f"metrics-{name}" for name in CONTAINERS
    ]
    for endpoint in monitor["podMetricsEndpoints"]:
        # The alert rules know the jobs api, fetcher and evictor: the names of the containers.
        assert {one["targetLabel"]: one["sourceLabels"] for one in endpoint["relabelings"]} == {
            "job": ["__meta_kubernetes_pod_container_name"],
            "node": ["__meta_kubernetes_pod_name"],
        }


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl here")
def test_kustomize_renders_it() -> None:
    done = subprocess.run(
        ["kubectl", "kustomize", str(FOLDER)], check=True, capture_output=True, text=True, timeout=120
    )
    rendered = list(yaml.safe_load_all(done.stdout))
    assert {one["metadata"].get("namespace") for one in rendered} == {"distributor"}
    cells = next(one for one in rendered if one["kind"] == "StatefulSet")
    for container in cells["spec"]["template"]["spec"]["containers"]:
        assert {one["name"] for one in container["env"]} == {one["name"] for one in CONTAINERS["api"]["env"]}
        assert container["image"].startswith("registry.example/")
        assert re.fullmatch(
            r"distributor-fleet-settings-\w+", container["envFrom"][0]["configMapRef"]["name"]
        )
