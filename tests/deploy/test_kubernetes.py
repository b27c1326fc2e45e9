"""deploy/kubernetes: every resource by its schema, and what the resources must agree on among each other."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from distributor_node.shared.settings import load_settings
from distributor_node.shared.settings.model import METRICS_PORTS, Settings

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "kubernetes"
VERSION = "1.31"  # of Kubernetes; what is written for it holds in later ones
# Resources of the two operators: what their specifications say of the fields that are used here. A type, or the fields
# below; [one] is a list of such; a "?" at the end of a name: it may be left out.
_LABELS = {"matchLabels": dict, "matchExpressions?": [{"key": str, "operator": str, "values": [str]}]}
_RELABELINGS = [{"action": str, "sourceLabels": [str], "targetLabel": str}]
_ENDPOINTS = [{"port": str, "path": str, "interval": str, "scrapeTimeout": str, "relabelings": _RELABELINGS}]
_RULE = {"alert?": str, "record?": str, "expr": str, "for?": str, "labels?": dict, "annotations?": dict}
CUSTOM: dict[str, tuple[str, Any]] = {
    "ScaledObject": (
        "keda.sh/v1alpha1",
        {
            "scaleTargetRef": {"apiVersion": str, "kind": str, "name": str},
            "minReplicaCount": int,
            "maxReplicaCount": int,
            "pollingInterval": int,
            "cooldownPeriod": int,
            "advanced": {
                "horizontalPodAutoscalerConfig": {
                    "behavior": {
                        "scaleDown": {
                            "stabilizationWindowSeconds": int,
                            "policies": [{"type": str, "value": int, "periodSeconds": int}],
                        }
                    }
                }
            },
            "triggers": [
                {
                    "type": str,
                    # All of them text: KEDA reads "16", not 16.
                    "metadata": {
                        "protocol": str,
                        "queueName": str,
                        "mode": str,
                        "excludeUnacknowledged": str,
                        "value": str,
                    },
                    "authenticationRef": {"name": str},
                }
            ],
        },
    ),
    "TriggerAuthentication": (
        "keda.sh/v1alpha1",
        {"secretTargetRef": [{"parameter": str, "name": str, "key": str}]},
    ),
    "PodMonitor": (
        "monitoring.coreos.com/v1",
        {"jobLabel?": str, "selector": _LABELS, "podMetricsEndpoints": _ENDPOINTS},
    ),
    "PrometheusRule": (
        "monitoring.coreos.com/v1",
        {"groups": [{"name": str, "rules": [_RULE]}]},
    ),
}
COMPONENTS = ("api", "fetcher", "evictor")
SECRET = "distributor-servers"


def resources() -> list[dict[str, Any]]:
    """All resources of all files that a kustomization names."""
    found = []
    for kustomization in sorted(FOLDER.glob("*/kustomization.yaml")):
        for name in yaml.safe_load(kustomization.read_text())["resources"]:
            found += list(yaml.safe_load_all((kustomization.parent / name).read_text()))
    return found


RESOURCES = resources()


def named(kind: str, name: str) -> dict[str, Any]:
    (found,) = [one for one in RESOURCES if (one["kind"], one["metadata"]["name"]) == (kind, name)]
    return found


def pod(component: str) -> dict[str, Any]:
    spec: dict[str, Any] = named("Deployment", f"distributor-{component}")["spec"]["template"]["spec"]
    return spec


def container(component: str) -> dict[str, Any]:
    (only,) = pod(component)["containers"]
    return dict(only)


def setting(name: str) -> str:
    lines = (FOLDER / "base" / "settings.env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines)[name]


@pytest.mark.parametrize("one", RESOURCES, ids=lambda one: f"{one['kind']}-{one['metadata']['name']}")
def test_fits_its_schema(one: dict[str, Any]) -> None:
    if one["kind"] in CUSTOM:
        version, specification = CUSTOM[one["kind"]]
        assert set(one) == {"apiVersion", "kind", "metadata", "spec"}
        assert one["apiVersion"] == version
        assert not list(misfits(one["spec"], specification))
    else:
        kubernetes_validate.validate(one, VERSION, strict=True)


def misfits(found: Any, wanted: Any, path: str = "spec") -> Iterator[str]:
    """Where a value is not as specified; see CUSTOM."""
    if isinstance(wanted, type):
        if type(found) is not wanted:
            yield f"{path} is {found!r}"
    elif isinstance(wanted, list):
        if not isinstance(found, list) or not found:
            yield f"{path} is no list, or empty"
            return
        for number, one in enumerate(found):
            yield from misfits(one, wanted[0], f"{path}[{number}]")
    elif not isinstance(found, dict):
        yield f"{path} is {found!r}"
    else:
        fields = {name.rstrip("?"): value for name, value in wanted.items()}
        needed = {name for name in wanted if not name.endswith("?")}
        yield from (f"{path}.{name} is unknown" for name in found.keys() - fields.keys())
        yield from (f"{path}.{name} is missing" for name in needed - found.keys())
        for name in found.keys() & fields.keys():
            yield from misfits(found[name], fields[name], f"{path}.{name}")


def test_incompatible_entries_are_detected() -> None:
    _, specification = CUSTOM["PodMonitor"]
    good = named("PodMonitor", "distributor-node")["spec"]
    endpoint = {**good["podMetricsEndpoints"][0], "prot": "http"}
    assert list(misfits({**good, "podMetricsEndpoints": [endpoint]}, specification)) == [
        "spec.podMetricsEndpoints[0].prot is unknown"
    ]
    assert list(misfits({**good, "jobLabel": 1}, specification)) == ["spec.jobLabel is 1"]
    assert list(misfits({**good, "podMetricsEndpoints": []}, specification)) == [
        "spec.podMetricsEndpoints is no list, or empty"
    ]


def test_durations_and_modes_are_ones_that_the_operators_know() -> None:
    for endpoint in named("PodMonitor", "distributor-node")["spec"]["podMetricsEndpoints"]:
        assert re.fullmatch(r"[0-9]+s", endpoint["interval"])
        assert int(endpoint["scrapeTimeout"][:-1]) <= int(endpoint["interval"][:-1])
    scaler = named("ScaledObject", "distributor-fetcher")["spec"]
    (trigger,) = scaler["triggers"]
    assert trigger["type"] == "rabbitmq"
    # By AMQP a scaler would see the jobs that wait, and by more for each than a fetcher runs at once it would take one
    # away from running downloads.
    assert trigger["metadata"]["mode"] == "QueueLength"
    assert trigger["metadata"]["protocol"] == "http"
    assert trigger["metadata"]["excludeUnacknowledged"] == "false"
    assert int(trigger["metadata"]["value"]) == int(setting("DISTRIBUTOR_FETCH__CONCURRENCY"))
    assert scaler["minReplicaCount"] < scaler["maxReplicaCount"]


def test_alerts_are_the_ones_that_promtool_tests() -> None:
    written = (FOLDER / "monitoring" / "rules.yaml").read_text()
    made = subprocess.run(
        [sys.executable, ROOT / "deploy" / "prometheus" / "kubernetes_rule.py"],
        check=True,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert written == made.stdout, "make reference"
    groups = named("PrometheusRule", "distributor-node")["spec"]["groups"]
    rules = ROOT / "deploy" / "prometheus" / "rules"
    tested = [
        group for path in sorted(rules.glob("*.yml")) for group in yaml.safe_load(path.read_text())["groups"]
    ]
    assert groups == tested


def test_all_files_are_named_by_a_kustomization() -> None:
    for kustomization in FOLDER.rglob("kustomization.yaml"):
        document = yaml.safe_load(kustomization.read_text())
        used = set(document["resources"])
        for generator in document.get("configMapGenerator", []):
            used |= {*generator.get("envs", []), *generator.get("files", [])}
        there = {path.name for path in kustomization.parent.iterdir()} - {"kustomization.yaml"}
        if kustomization.parent == FOLDER:
            there.remove("fleet")  # applied by itself, instead of the others
        assert used == there


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl here")
def test_kustomize_renders_it() -> None:
    done = subprocess.run(
        ["kubectl", "kustomize", str(FOLDER)], check=True, capture_output=True, text=True, timeout=120
    )
    rendered = list(yaml.safe_load_all(done.stdout))
    assert {one["kind"] for one in rendered} >= {"Deployment", "ConfigMap", *CUSTOM}
    assert {one["metadata"].get("namespace") for one in rendered} == {"distributor"}
    settings = next(
        one["metadata"]["name"]
        for one in rendered
        if one["kind"] == "ConfigMap" and "settings" in one["metadata"]["name"]
    )
    assert done.stdout.count(settings) == 1 + len(COMPONENTS)


@pytest.mark.parametrize("component", COMPONENTS)
def test_pods_are_hardened_and_probed(component: str) -> None:
    spec, only = pod(component), container(component)
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] == 10001
    assert spec["automountServiceAccountToken"] is False
    assert only["securityContext"]["readOnlyRootFilesystem"] is True
    assert only["securityContext"]["allowPrivilegeEscalation"] is False
    assert only["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert "memory" in only["resources"]["limits"]
    ports = {one["name"]: one["containerPort"] for one in only["ports"]}
    assert ports == {"metrics": METRICS_PORTS[component], **({"http": 3334} if component == "api" else {})}
    for probe, path in {"startup": "/healthz", "liveness": "/healthz", "readiness": "/readyz"}.items():
        # Not the public port: an operator may close it, and the process must go on.
        assert only[f"{probe}Probe"]["httpGet"] == {"path": path, "port": "metrics"}
    assert only["args"] == [component]


@pytest.mark.parametrize("component", COMPONENTS)
def test_all_share_one_volume_which_the_api_cannot_write(component: str) -> None:
    (media,) = [one for one in pod(component)["volumes"] if one["name"] == "media"]
    assert media["persistentVolumeClaim"]["claimName"] == "distributor-media"
    (mount,) = [one for one in container(component)["volumeMounts"] if one["name"] == "media"]
    assert mount["mountPath"] == setting("DISTRIBUTOR_STORAGE__PATH")
    assert mount.get("readOnly", False) is (component == "api")
    assert named("PersistentVolumeClaim", "distributor-media")["spec"]["accessModes"] == ["ReadWriteMany"]


@pytest.mark.parametrize("component", COMPONENTS)
def test_a_stop_has_time_to_drain(component: str) -> None:
    only = container(component)
    slept = re.search(r"sleep\((\d+)\)", str(only.get("lifecycle", "")))
    before = int(slept[1]) if slept else 0
    assert pod(component)["terminationGracePeriodSeconds"] > before + float(
        setting("DISTRIBUTOR_SHUTDOWN_DEADLINE")
    )


def test_the_limit_leaves_room_on_the_volume() -> None:
    asked = named("PersistentVolumeClaim", "distributor-media")["spec"]["resources"]["requests"]["storage"]
    assert asked.endswith("Gi")
    limit = setting("DISTRIBUTOR_STORAGE__LIMIT")
    assert limit.endswith("G")
    assert int(limit[:-1]) < int(asked[:-2])


@pytest.mark.parametrize("component", COMPONENTS)
def test_all_have_the_same_settings(component: str) -> None:
    """What is set for the API, such as handing files over to a server in front, the evictor has to know too."""
    only = container(component)
    assert only["envFrom"] == [{"configMapRef": {"name": "distributor-settings"}}]
    assert all("secretKeyRef" in one["valueFrom"] for one in only["env"])


def test_settings_are_ones_that_the_node_knows() -> None:
    lines = (FOLDER / "base" / "settings.env").read_text().splitlines()
    settings = load_settings(None, dict(line.split("=", 1) for line in lines))
    # Hosts share the volume over a network: bytes that one writes are not seen by another at once.
    assert settings.public_api.follow_growing_files is False


def test_secrets_are_referred_to_and_not_contained() -> None:
    assert not [one for one in RESOURCES if one["kind"] == "Secret"]
    text = "".join(path.read_text() for path in FOLDER.rglob("*") if path.is_file())
    assert not re.search(r"(amqps?|rediss?)://", text)
    for component in COMPONENTS:
        references = {one["name"]: one["valueFrom"]["secretKeyRef"] for one in container(component)["env"]}
        assert references == {
            "DISTRIBUTOR_STATE_STORE__URL": {"name": SECRET, "key": "state-store-url"},
            "DISTRIBUTOR_JOB_QUEUE__URL": {"name": SECRET, "key": "job-queue-url"},
        }


def test_disruptions_leave_one_replica() -> None:
    budgets = {name: named("PodDisruptionBudget", f"distributor-{name}")["spec"] for name in COMPONENTS}
    assert budgets["api"]["minAvailable"] == budgets["evictor"]["minAvailable"] == 1
    assert budgets["fetcher"]["maxUnavailable"] == 1
    assert all(
        named("Deployment", f"distributor-{name}")["spec"]["replicas"] >= 2 for name in ("api", "evictor")
    )
    strategy = named("Deployment", "distributor-api")["spec"]["strategy"]["rollingUpdate"]
    assert strategy == {"maxSurge": 1, "maxUnavailable": 0}


def test_selectors_select_what_is_there() -> None:
    for component in COMPONENTS:
        deployment = named("Deployment", f"distributor-{component}")["spec"]
        labels = deployment["template"]["metadata"]["labels"]
        budget = named("PodDisruptionBudget", f"distributor-{component}")["spec"]
        assert labels == deployment["selector"]["matchLabels"] == budget["selector"]["matchLabels"]
    assert named("Service", "distributor-api")["spec"]["selector"] == {
        "app.kubernetes.io/name": "distributor-node",
        "app.kubernetes.io/component": "api",
    }


def test_fetchers_are_scaled_by_the_queue_that_the_node_uses() -> None:
    scaler, settings = named("ScaledObject", "distributor-fetcher")["spec"], Settings.model_fields
    assert scaler["scaleTargetRef"]["name"] == "distributor-fetcher"
    assert "replicas" not in named("Deployment", "distributor-fetcher")["spec"]
    (trigger,) = scaler["triggers"]
    prefix = settings["job_queue"].default.prefix
    assert trigger["metadata"]["queueName"] == f"{prefix}.jobs"
    assert scaler["minReplicaCount"] >= 1
    authentication = named("TriggerAuthentication", trigger["authenticationRef"]["name"])["spec"]
    assert authentication["secretTargetRef"] == [
        {"parameter": "host", "name": SECRET, "key": "job-queue-management-url"}
    ]


def test_prometheus_finds_the_ports_and_names_the_jobs_as_the_rules_do() -> None:
    monitor = named("PodMonitor", "distributor-node")["spec"]
    assert monitor["jobLabel"] == "app.kubernetes.io/component"
    (components,) = monitor["selector"]["matchExpressions"]
    assert tuple(components["values"]) == COMPONENTS
    assert [one["port"] for one in monitor["podMetricsEndpoints"]] == ["metrics"]


def test_metrics_bear_the_name_of_their_node() -> None:
    """The alert rules look at nothing without the label `node`."""
    endpoints = named("PodMonitor", "distributor-node")["spec"]["podMetricsEndpoints"]
    wanted = {
        "action": "replace",
        "sourceLabels": ["__meta_kubernetes_pod_label_app_kubernetes_io_instance"],
        "targetLabel": "node",
    }
    assert all(one["relabelings"] == [wanted] for one in endpoints)
    labels = yaml.safe_load((FOLDER / "base" / "kustomization.yaml").read_text())["labels"]
    assert any("app.kubernetes.io/instance" in one["pairs"] and one["includeTemplates"] for one in labels)


def test_only_the_api_is_open_to_all_and_metrics_to_none_but_prometheus() -> None:
    clients, api_metrics = named("NetworkPolicy", "distributor-api")["spec"]["ingress"]
    assert clients == {"ports": [{"protocol": "TCP", "port": "http"}]}
    (worker_metrics,) = named("NetworkPolicy", "distributor-workers")["spec"]["ingress"]
    for rule in (api_metrics, worker_metrics):
        assert rule["from"]
        assert rule["ports"] == [{"protocol": "TCP", "port": "metrics"}]
