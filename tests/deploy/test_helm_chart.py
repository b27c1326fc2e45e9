"""deploy/helm: the chart makes the same resources as deploy/kubernetes, and its values reach what they name."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from distributor_node.shared.settings import load_settings
from tests.deploy.test_kubernetes import CUSTOM, VERSION, misfits

ROOT = Path(__file__).parents[2]
CHART = ROOT / "deploy" / "helm" / "distributor-node"
KUSTOMIZE = ROOT / "deploy" / "kubernetes"
CELLS = ("--set", "cells.enabled=true")
Resources = dict[tuple[str, str], dict[str, Any]]


def helm() -> str | None:
    """The program that the development requirements bring, or one on PATH."""
    beside = Path(sys.executable).parent / "helm"
    return str(beside) if beside.exists() else shutil.which("helm")


pytestmark = pytest.mark.skipif(helm() is None, reason="no Helm for this processor")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = helm()
    assert program is not None
    return subprocess.run([program, *arguments], capture_output=True, text=True, timeout=60, check=False)


def rendered(release: str, *arguments: str) -> Resources:
    done = run("template", release, str(CHART), *arguments)
    assert done.returncode == 0, done.stderr
    documents = [one for one in yaml.safe_load_all(done.stdout) if one is not None]
    found = by_name(documents)
    assert len(found) == len(documents)
    return found


def by_name(documents: list[dict[str, Any]]) -> Resources:
    """Resources by kind and name, without the part of a name that is made from the content."""
    text = json.dumps(documents)
    names = {one["metadata"]["name"] for one in documents if one["kind"] == "ConfigMap"}
    for name in names:
        text = text.replace(f'"{name}"', f'"{re.sub("-[0-9a-z]{10}$", "", name)}"')
    return {(one["kind"], one["metadata"]["name"]): one for one in json.loads(text)}


def kustomized(*folders: str) -> Resources:
    """What `kubectl kustomize` makes of these folders, as far as their files use it."""
    documents: list[dict[str, Any]] = []
    for folder in folders:
        kustomization = yaml.safe_load((KUSTOMIZE / folder / "kustomization.yaml").read_text())
        own: list[dict[str, Any]] = []
        for name in kustomization["resources"]:
            # Copies, since aliases of one document are one object.
            loaded = yaml.safe_load_all((KUSTOMIZE / folder / name).read_text())
            own += [json.loads(json.dumps(one)) for one in loaded]
        for generator in kustomization.get("configMapGenerator", []):
            own.append(config_map(KUSTOMIZE / folder, generator))
        for labels in kustomization.get("labels", []):
            for one in own:
                add_labels(one, labels["pairs"])
        documents += own
    tags = yaml.safe_load((KUSTOMIZE / "kustomization.yaml").read_text())["images"][0]
    for one in documents:
        for container in containers(one):
            assert container["image"] == tags["name"]
            container["image"] = f"{tags['newName']}:{tags['newTag']}"
    return by_name(documents)


def config_map(folder: Path, generator: dict[str, Any]) -> dict[str, Any]:
    data: dict[str, str] = {}
    for name in generator.get("envs", []):
        data |= dict(line.split("=", 1) for line in (folder / name).read_text().splitlines())
    for name in generator.get("files", []):
        data[name] = (folder / name).read_text()
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": generator["name"]}, "data": data}


def add_labels(one: dict[str, Any], pairs: dict[str, str]) -> None:
    one["metadata"].setdefault("labels", {}).update(pairs)
    if one["kind"] in ("Deployment", "StatefulSet"):
        one["spec"]["template"]["metadata"]["labels"].update(pairs)


def containers(one: dict[str, Any]) -> list[dict[str, Any]]:
    if one["kind"] not in ("Deployment", "StatefulSet"):
        return []
    found: list[dict[str, Any]] = one["spec"]["template"]["spec"]["containers"]
    return found


def in_any_order(found: Resources) -> Resources:
    """The same, with volumes by name: their order says nothing."""
    sorted_ones = copy.deepcopy(found)
    for one in sorted_ones.values():
        if containers(one):
            one["spec"]["template"]["spec"]["volumes"].sort(key=lambda volume: volume["name"])
    return sorted_ones


def settings_of(resources: Resources, name: str) -> dict[str, str]:
    data: dict[str, str] = resources["ConfigMap", name]["data"]
    return data


def test_it_has_no_fault_that_helm_finds() -> None:
    done = run("lint", "--strict", str(CHART))
    assert done.returncode == 0, done.stdout
    done = run("lint", "--strict", str(CHART), *CELLS)
    assert done.returncode == 0, done.stdout


def test_its_version_is_the_programs() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert chart["version"] == chart["appVersion"] == project["version"]


def test_a_node_is_the_one_of_kustomize() -> None:
    ours, wanted = rendered("distributor-node"), kustomized("base", "keda", "monitoring")
    assert ours.keys() == wanted.keys()
    for name, one in in_any_order(wanted).items():
        assert in_any_order(ours)[name] == one


def test_cells_are_the_ones_of_kustomize() -> None:
    ours, wanted = rendered("distributor-fleet", *CELLS), kustomized("fleet", "monitoring")
    assert ours.keys() == wanted.keys()
    for name, one in in_any_order(wanted).items():
        assert in_any_order(ours)[name] == one


@pytest.mark.parametrize("mode", [(), CELLS], ids=["node", "cells"])
def test_all_resources_fit_their_schemas(mode: tuple[str, ...]) -> None:
    for one in rendered("media", *mode).values():
        if one["kind"] in CUSTOM:
            version, specification = CUSTOM[one["kind"]]
            assert one["apiVersion"] == version
            assert not list(misfits(one["spec"], specification))
        else:
            kubernetes_validate.validate(one, VERSION, strict=True)


def test_more_cells_know_each_other() -> None:
    found = rendered("media", *CELLS, "--set", "cells.count=5")
    given = settings_of(found, "distributor-fleet-settings")
    rules = load_settings(
        None, given | {"DISTRIBUTOR_PEERS__OWN_URL": "http://distributor-cell-4.distributor-cells:3337"}
    ).peers.rules
    assert rules is not None
    assert len(rules.urls) == found["StatefulSet", "distributor-cell"]["spec"]["replicas"] == 5
    assert rules.own in rules.urls


def test_values_reach_what_they_name() -> None:
    found = rendered(
        "media",
        *("--set", "fetcher.concurrency=20,settings.DISTRIBUTOR_STORAGE__LIMIT=90G,storage.size=100Gi"),
        *("--set", "settings.DISTRIBUTOR_JOB_QUEUE__PREFIX=media,storage.className=cephfs"),
        *("--set", "image.tag=2.0.0,api.replicas=4,monitoring.labels.release=prometheus"),
        *("--set", "settings.DISTRIBUTOR_PUBLIC_API__FOLLOW_GROWING_FILES=true"),
    )
    given = settings_of(found, "distributor-settings")
    settings = load_settings(None, given)
    assert settings.id == "media"
    assert settings.fetch.concurrency == 20
    assert settings.storage.limit == 90 * 1024**3
    assert settings.public_api.follow_growing_files is True
    (trigger,) = found["ScaledObject", "distributor-fetcher"]["spec"]["triggers"]
    assert (trigger["metadata"]["queueName"], trigger["metadata"]["value"]) == ("media.jobs", "20")
    claim = found["PersistentVolumeClaim", "distributor-media"]["spec"]
    assert (claim["storageClassName"], claim["resources"]["requests"]["storage"]) == ("cephfs", "100Gi")
    api = found["Deployment", "distributor-api"]["spec"]
    assert api["replicas"] == 4
    assert api["template"]["spec"]["containers"][0]["image"] == "registry.example/distributor-node:2.0.0"
    for kind in ("PodMonitor", "PrometheusRule"):
        assert found[kind, "distributor-node"]["metadata"]["labels"]["release"] == "prometheus"


def test_a_changed_setting_or_manifest_restarts_the_pods() -> None:
    def references(*arguments: str) -> set[str]:
        done = run("template", "media", str(CHART), *arguments)
        return set(re.findall(r"distributor-(?:settings|manifest)-[0-9a-f]{10}", done.stdout))

    before = references()
    assert len(before) == 2
    assert len(references("--set", "settings.DISTRIBUTOR_STORAGE__LIMIT=90G") & before) == 1
    assert len(references("--set", "manifest=version: 1") & before) == 1


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ("settings.STORAGE=1", "settings"),
        ("cells.count=0", "cells.count"),
        ("storage.size=big", "storage.size"),
        ("fetchers.concurrency=3", "fetchers"),
    ],
)
def test_wrong_values_are_named(given: str, named: str) -> None:
    done = run("template", "media", str(CHART), "--set", given)
    assert done.returncode != 0
    assert named in done.stderr


def test_the_operators_parts_can_be_left_out() -> None:
    found = rendered("media", "--set", "keda.enabled=false,monitoring.enabled=false")
    assert not {kind for kind, _ in found} & CUSTOM.keys()


def test_the_package_contains_the_rules(tmp_path: Path) -> None:
    """They are a link in the repository, and must not be one in the package."""
    done = run("package", str(CHART), "--destination", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (package,) = tmp_path.glob("*.tgz")
    installed = run("template", "media", str(package))
    assert installed.returncode == 0, installed.stderr
    assert any(
        one and one["kind"] == "PrometheusRule" and one["spec"]["groups"]
        for one in yaml.safe_load_all(installed.stdout)
    )
