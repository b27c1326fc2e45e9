"""deploy/compose/fleet.yml as text: the cells agree with each other, with the edge and with docker-compose.yml."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from distributor_node.shared.settings import load_settings

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "deploy" / "compose" / "fleet.yml").read_text()
FILE: dict[str, Any] = yaml.safe_load(TEXT)
SERVICES: dict[str, dict[str, Any]] = FILE["services"]
CELLS = ("cell-a", "cell-b", "cell-c")
NODE_FILE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())


def without_variables(value: str) -> str:
    """With the defaults of the variables in their places."""
    return re.sub(r"\$\{[A-Z_]+:?-([^}]*)\}", r"\1", value)


def test_the_services() -> None:
    assert set(SERVICES) == {*CELLS, "edge", "demo"}
    assert SERVICES["demo"]["profiles"] == ["demo"]


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_is_hardened(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["user"] == "10001:10001"
    assert service["mem_limit"].startswith("${")


@pytest.mark.parametrize("cell", CELLS)
def test_a_cell_has_settings_that_the_node_knows(cell: str) -> None:
    service = SERVICES[cell]
    given = {
        name: without_variables(value)
        for name, value in service["environment"].items()
        if name.startswith("DISTRIBUTOR_")
    }
    settings = load_settings(None, given)
    rules = settings.peers.rules
    assert rules is not None
    assert rules.own == f"http://{cell}:3337" == f"http://{cell}:{settings.peers.port}"
    assert sorted(rules.urls) == [f"http://{name}:3337" for name in CELLS]
    assert settings.public_api.port == 3334  # that the edge leads to
    assert settings.id == cell
    assert service["command"] == ["standalone"]
    settings.check_for("standalone")


def test_each_cell_has_a_volume_of_its_own() -> None:
    media = [
        mount["source"] for cell in CELLS for mount in SERVICES[cell]["volumes"] if mount["type"] == "volume"
    ]
    assert len(set(media)) == len(CELLS)
    assert set(media) == set(FILE["volumes"])


def test_the_edge_knows_all_cells_and_hands_no_files_over() -> None:
    environment = SERVICES["edge"]["environment"]
    assert environment["EDGE_UPSTREAMS"].split() == [f"{cell}:3334" for cell in CELLS]
    assert environment["EDGE_SENDFILE_TYPE"] == ""
    assert without_variables(environment["EDGE_BALANCE"]) == "least_conn"  # the cells are peers
    template = (ROOT / "deploy" / "edge" / "distributor.conf.template").read_text()
    # The others have defaults in start.sh, or are made there.
    needed = {"EDGE_PREFIX", "EDGE_OBJECTS_PREFIX", "EDGE_SENDFILE_TYPE", "EDGE_CONNECTIONS_PER_ADDRESS"}
    assert needed <= set(environment)
    assert all("${" + name + "}" in template for name in needed)


def test_images_are_those_of_the_single_node() -> None:
    assert SERVICES["edge"]["image"] == NODE_FILE["services"]["edge"]["image"]
    assert SERVICES["cell-a"]["image"] == NODE_FILE["services"]["api"]["image"]
    assert "/etc/distributor-edge" in json.dumps(SERVICES["edge"]["volumes"])
