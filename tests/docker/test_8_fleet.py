"""deploy/compose/fleet.yml in containers: three cells behind the edge act as one cache."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from distributor_node.services.demo.manifest import manifest_text
from distributor_node.services.demo.objects import demo_objects
from distributor_node.shared.domain.peers import Ring
from tests.docker.compose import ROOT, ComposeStack, run
from tests.docker.conftest import _demo_directory
from tests.end_to_end.client import get
from tests.waiting import eventually, poll

pytestmark = pytest.mark.docker

CELLS = ("cell-a", "cell-b", "cell-c")
NAMES = {f"http://{cell}:3337": cell for cell in CELLS}
"""The cells by `peers.own_url`: at the port for peers."""
OBJECTS = ("1", "2", "3", "4", "5")


def homes(object_id: str) -> list[str]:
    """The cells in their order for the object."""
    return [NAMES[name] for name in Ring(dict.fromkeys(NAMES, 1.0)).ranked(object_id)]


class FleetStack(ComposeStack):
    """The fleet's file instead of the node's."""

    def compose(self, *arguments: str, check: bool = True, timeout: float = 300) -> str:
        file = ("--project-directory", str(ROOT), "--file", str(ROOT / "deploy" / "compose" / "fleet.yml"))
        return super().compose(*file, *arguments, check=check, timeout=timeout)

    def cell_url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.ports['EDGE_PORT']}{path}"

    def stored(self, cell: str) -> set[str]:
        """The objects on one cell's volume."""
        return set(
            self.exec(cell, "sh", "-c", "find /var/lib/distributor/objects -type f -printf '%f\\n'").split()
        )


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FleetStack]:
    folder: Path = tmp_path_factory.mktemp("fleet")
    demo = _demo_directory(folder / "demo")
    manifest = folder / "manifest.yaml"
    manifest.write_text(manifest_text(demo_objects(demo / "media"), "http://demo:3390/api/v1/files/"))
    settings = folder / "settings.env"
    # All objects count as large, and no object is hot. The manifest is a file that all cells have: it serves as secret.
    settings.write_text(
        f"DISTRIBUTOR_OPERATOR_API__SECRET={secrets.token_hex(16)}\n"
        "DISTRIBUTOR_PEERS__KEEP_BELOW=0\nDISTRIBUTOR_PEERS__HOT_VIEWS=1000\n"
        "DISTRIBUTOR_PEERS__COPIES=2\nDISTRIBUTOR_PEERS__COPY_AFTER=0\n"
        "DISTRIBUTOR_PEERS__SECRET_FILE=/etc/distributor/manifest.yaml\n"
    )
    stack = FleetStack(
        folder,
        {
            "STORAGE_LIMIT": "200M",
            "SETTINGS_FILE": str(settings),
            "MANIFEST_FILE": str(manifest),
            "DEMO_DIRECTORY": str(demo),
        },
    )
    try:
        stack.compose("build", "--quiet", "cell-a", "demo", timeout=900)
        stack.compose("up", "--detach", "--build", "--wait", "--wait-timeout", "240", timeout=420)
        yield stack
    finally:
        stack.remove()


async def test_the_cells_see_each_other(fleet: FleetStack) -> None:
    status = (await get(fleet.cell_url("/api/v1/status"))).json()
    assert len(status["peers"]["alive"]) == len(CELLS) - 1


_ASK = """
import sys, urllib.error, urllib.request
request = urllib.request.Request(sys.argv[1], headers=dict([sys.argv[2:]] if sys.argv[2:] else []))
try:
    print(urllib.request.urlopen(request, timeout=9).status)
except urllib.error.HTTPError as error:
    print(error.code)
"""


def test_the_port_for_peers_serves_peers_alone(fleet: FleetStack) -> None:
    url = "http://cell-a:3337/api/v1/status"
    assert fleet.exec("cell-b", "python3", "-c", _ASK, url).split() == ["403"]
    assert fleet.exec("cell-b", "python3", "-c", _ASK, url, "X-Distributor-Hop", "1").split() == ["200"]


async def test_an_object_is_stored_by_its_home_and_from_its_second_view_by_the_next_in_rank(
    fleet: FleetStack,
) -> None:
    answers = await asyncio.gather(*(get(fleet.cell_url("/api/v1/assets/1")) for _ in range(3)))
    assert {answer.status for answer in answers} == {200}
    assert len({answer.body for answer in answers}) == 1
    home, second, third = homes("1")
    poll(lambda: "1" in fleet.stored(home), 60, what="the object is stored")

    async def copied() -> bool:
        assert (await get(fleet.cell_url("/api/v1/assets/1"))).status == 200
        return "1" in fleet.stored(second)

    await eventually(copied, 60, pause=1, what="the second copy")
    assert "1" not in fleet.stored(third)


async def test_a_stopped_cell_is_not_missed_even_if_the_source_is_gone(fleet: FleetStack) -> None:
    async def all_copied() -> bool:
        for object_id in OBJECTS:
            assert (await get(fleet.cell_url(f"/api/v1/assets/{object_id}"))).status == 200
        stored = {cell: fleet.stored(cell) for cell in CELLS}
        return all(object_id in stored[cell] for object_id in OBJECTS for cell in homes(object_id)[:2])

    await eventually(all_copied, 120, pause=1, what="second copies of all")
    stopped = homes(OBJECTS[0])[0]
    fleet.compose("stop", "--timeout", "20", stopped, "demo")
    try:
        for object_id in OBJECTS * 2:
            assert (await get(fleet.cell_url(f"/api/v1/assets/{object_id}"))).status == 200
    finally:
        fleet.compose("start", stopped, "demo")
        fleet.until_healthy(stopped)


def test_the_project_leaves_nothing_behind_when_it_is_down(fleet: FleetStack) -> None:
    fleet.down()
    assert not fleet.compose("ps", "--quiet", "--all").split()
    volumes = run("docker", "volume", "ls", "--quiet", "--filter", f"name={fleet.project}").stdout.split()
    assert len(volumes) == len(CELLS)
