"""deploy/compose/fleet.yml in containers: three cells behind the edge act as one cache."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from distributor_node.services.demo.manifest import manifest_text
from distributor_node.services.demo.objects import demo_objects
from tests.docker.compose import ROOT, ComposeStack, run
from tests.docker.conftest import _demo_directory
from tests.end_to_end.client import get
from tests.waiting import poll

pytestmark = pytest.mark.docker

CELLS = ("cell-a", "cell-b", "cell-c")


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
    settings.write_text(
        f"DISTRIBUTOR_OPERATOR_API__SECRET={secrets.token_hex(16)}\nDISTRIBUTOR_PEERS__KEEP_BELOW=0\n"
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


async def test_an_object_that_all_cells_are_asked_for_is_stored_by_its_home(fleet: FleetStack) -> None:
    answers = await asyncio.gather(*(get(fleet.cell_url("/api/v1/assets/1")) for _ in range(3)))
    assert {answer.status for answer in answers} == {200}
    assert len({answer.body for answer in answers}) == 1
    poll(lambda: any("1" in fleet.stored(cell) for cell in CELLS), 60, what="the object is stored")


async def test_a_stopped_cell_is_not_missed(fleet: FleetStack) -> None:
    fleet.compose("stop", "--timeout", "20", "cell-b")
    try:
        for object_id in ("1", "2", "3", "4", "5"):
            assert (await get(fleet.cell_url(f"/api/v1/assets/{object_id}"))).status == 200
    finally:
        fleet.compose("start", "cell-b")
        fleet.until_healthy("cell-b")


def test_the_project_leaves_nothing_behind_when_it_is_down(fleet: FleetStack) -> None:
    fleet.down()
    assert not fleet.compose("ps", "--quiet", "--all").split()
    volumes = run("docker", "volume", "ls", "--quiet", "--filter", f"name={fleet.project}").stdout.split()
    assert len(volumes) == len(CELLS)
