"""`make run`: a standalone node and two demo storage nodes on this machine, with a page and URLs to try."""

from __future__ import annotations

import argparse
import fcntl
import socket
import subprocess
import sys
from collections.abc import Iterable, Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, TextIO

import yaml

from distributor_node.services.demo.manifest import DEMO_DIRECTORY, write_manifest
from distributor_node.services.demo.objects import (
    MIB,
    DemoObject,
    GeneratedContent,
    demo_objects,
    media_objects,
)
from distributor_node.services.demo.storage_node import Site, StorageNode
from distributor_node.services.demo_run.story import Story
from distributor_node.services.standalone.main import RunningNode, run_standalone
from distributor_node.shared.domain.errors import ConfigurationError
from distributor_node.shared.runtime.run_service import MISCONFIGURED, ServiceScope, run_service
from distributor_node.shared.settings import Settings, load_settings
from distributor_node.shared.settings.model import METRICS_PORTS

HOST = "127.0.0.1"
FIRST_PUBLIC_PORT, FIRST_OPERATOR_PORT, FIRST_DASHBOARD_PORT = 3334, 3335, 3336
FIRST_SOURCE_PORT, FIRST_SQUID_PORT = 3390, 4352
PORT_GROUPS = {
    "public_api": FIRST_PUBLIC_PORT,
    "operator_api": FIRST_OPERATOR_PORT,
    "dashboard": FIRST_DASHBOARD_PORT,
    "metrics": METRICS_PORTS["standalone"],
}
"""The groups of the settings that have a port, with the first one to try."""
DEFAULT_PORTS = frozenset({*PORT_GROUPS.values(), 3337, *METRICS_PORTS.values()})
"""Of a node and its services; 3337 is the port for peers. A second demo leaves them to a real node on this machine."""
WORKER = 7
FILM = "10-minute.mp4"
FILLERS = 6
"""Objects of 64 MiB which, with the one that the demo has anyway, do not fit into the cache together."""
STORAGE_LIMIT = "400M"
LOW_WATERMARK = 0.5
"""So low that there is ample room, in which films are fetched to their ends, in an empty cache alone."""
SETTINGS_FILE = "settings.yaml"
_MAX_PORTS_TRIED = 200


def main(arguments: list[str] | None = None) -> int:
    """Run until Ctrl-C, and return the exit code."""
    options = _parser().parse_args(arguments)
    folder: Path = options.data
    squid_port = 0
    try:
        lock = locked(folder)
        ports = choose_ports(options)
        source_port, mirror_port = ports["source"], ports["mirror"]
        film = make_film(folder / "film")
        fillers = filling_objects()
        objects = [*demo_objects(DEMO_DIRECTORY / "media"), film, *fillers]
        if options.catalog == "joystream":
            squid_port = ports["squid"]
            squid = f"http://{HOST}:{squid_port}"
            catalog = {
                "kind": "joystream",
                "squid": f"{squid}/graphql",
                "chain": f"{squid}/chain",
                "refuse_private_sources": False,  # the demo's storage node is at this machine's own address
            }
        else:
            manifest = folder / "manifest.yaml"
            bases = (f"http://{HOST}:{port}/api/v1/files/" for port in (source_port, mirror_port))
            write_manifest(manifest, objects, *bases)
            catalog = {"kind": "manifest", "manifest": str(manifest)}
        settings = demo_settings(folder, catalog, ports)
    except ConfigurationError as error:
        print(f"The demo cannot start:\n{error}", file=sys.stderr)
        return MISCONFIGURED

    async def serve(scope: ServiceScope) -> None:
        node_url = f"http://{HOST}:{settings.public_api.port}"
        mirror = StorageNode(objects)
        sources = [mirror]
        story = Story(
            film, sources, [*fillers, *(item for item in objects if item.object_id == "64")], node_url
        )
        shown = tuple(item for item in objects if item not in fillers and item is not film)
        site = Site(
            DEMO_DIRECTORY / "page" / "index.html", node_url, shown, dashboard_url(settings), story=story
        )
        source = StorageNode(objects, site=site)
        sources.insert(0, source)
        for node, port in ((source, source_port), (mirror, mirror_port)):
            await scope.resources.enter_async_context(node.run(HOST, port))
        story.set_paces()
        if squid_port:
            await run_squid(scope.resources, objects, [source.url, mirror.url], squid_port)

        def started(node: RunningNode) -> None:
            story.node = node

        try:
            await run_standalone(
                scope,
                settings,
                lambda port: print(
                    greeting(port, source_port, settings, objects, folder),
                    flush=True,
                ),
                started,
            )
        finally:
            await story.close()

    with lock:
        code = run_service(serve, name="demo", settings=settings)
    if code == 0:
        print("Stopped. The cached objects are kept for the next start.")
    return code


def dashboard_url(settings: Settings) -> str:
    """Return the URL of the node's own page, empty if it has none."""
    return f"http://{HOST}:{settings.dashboard.port}/" if settings.dashboard.enabled else ""


def locked(folder: Path) -> TextIO:
    """Make the folder, and lock it until the file is closed. Raises ConfigurationError if that fails, or another demo
    runs there.

    The settings and the manifest name ports: written again, they would lead a running node to other sources.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("w")
    except OSError as error:
        raise ConfigurationError(f"--data: cannot use {folder}: {error.strerror}") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise ConfigurationError(
            f"{folder} is in use by another `make run`. Another directory: make run ARGS='--data DIRECTORY'"
        ) from error
    return file


def make_film(folder: Path) -> DemoObject:
    """Return the film of the story, which is made at the first start. Raises ConfigurationError if that fails."""
    path = folder / FILM
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        made = subprocess.run(  # noqa: S603  a script of this repository
            [sys.executable, DEMO_DIRECTORY / "make_film.py", path],
            capture_output=True,
            text=True,
            check=False,
        )
        if made.returncode:
            raise ConfigurationError(f"make_film.py: {made.stderr.strip()[-500:]}")
    (film,) = media_objects(folder)
    return film


def filling_objects() -> list[DemoObject]:
    """Return the objects that fill the cache."""
    return [
        DemoObject(str(number), GeneratedContent(number, 64 * MIB), name=f"64 MiB generated, {number - 70}")
        for number in range(71, 71 + FILLERS)
    ]


async def run_squid(
    resources: AsyncExitStack, objects: list[DemoObject], endpoints: list[str], port: int
) -> None:
    """Start a squid with the demo's objects. Raises ConfigurationError if its GraphQL library is not installed."""
    try:
        from distributor_node.services.demo.squid import TestSquid  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise ConfigurationError(f"the demo's squid needs {error.name}: `make setup` installs it") from error
    squid = TestSquid(objects, endpoints, workers={WORKER: ["0:1"]}, bags_per_bucket=2)
    await resources.enter_async_context(squid.run(HOST, port))
    print(f"Demo squid (PUT /faults injects faults): {squid.url}")


def demo_settings(folder: Path, catalog: dict[str, Any], ports: Mapping[str, int]) -> Settings:
    """Write the demo's settings to a file, and load it. The environment overrides them."""
    fields = {
        "id": "demo",
        "environment": "demo",
        "buckets": ["0:1"],
        **{group: {"host": HOST, "port": ports[group]} for group in PORT_GROUPS},
        "catalog": catalog,
        "storage": {"path": str(folder / "volume"), "limit": STORAGE_LIMIT, "low_watermark": LOW_WATERMARK},
        # So that the first viewer of each scene has the film fetched, and not proxied.
        "admission": {"above_size": "off"},
        "fetch": {"viewer_timeout": 5},
        "evictor": {"min_idle": 5},
        "shutdown_deadline": 10,
        "log": {"level": "warning", "format": "console"},
    }
    file = folder / SETTINGS_FILE
    file.write_text(yaml.safe_dump(fields, sort_keys=False), encoding="utf-8")
    return load_settings(file)


def port_number(text: str) -> int:
    """Read the argument of an option. Raises ArgumentTypeError."""
    if not (text.isascii() and text.isdigit() and 0 < int(text) < 65536):
        raise argparse.ArgumentTypeError(f"expected a port from 1 to 65535, got {text[:20]!r}")
    return int(text)


def choose_ports(options: argparse.Namespace) -> dict[str, int]:
    """Return the ports of the demo by what they are for. Raises ConfigurationError if there are none."""
    wanted = {
        "source": options.storage_node_port,
        "mirror": options.storage_node_port + 1,
        "squid": FIRST_SQUID_PORT,
        **PORT_GROUPS,
        "public_api": options.port,
    }
    ports: dict[str, int] = {}
    for name, first in wanted.items():
        ports[name] = free_port_from(first, ports.values())
    return ports


def free_port_from(first: int, chosen: Iterable[int] = ()) -> int:
    """Return the first free port from `first` on that is not `chosen` for something else, and is the default of nothing
    else."""
    taken = set(chosen)
    for port in range(first, min(first + _MAX_PORTS_TRIED, 65536)):
        if port in taken or (port != first and port in DEFAULT_PORTS):
            continue
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            return port
    raise ConfigurationError(f"no free port from {first} to {first + _MAX_PORTS_TRIED - 1}")


def greeting(port: int, source_port: int, settings: Settings, objects: list[DemoObject], folder: Path) -> str:
    """Return the text printed at the start: URLs and commands to try. `port`: the public one."""
    file = folder / SETTINGS_FILE
    if file.is_relative_to(Path.cwd()):
        file = file.relative_to(Path.cwd())
    node, dashboard = f"http://{HOST}:{port}", dashboard_url(settings)
    metrics = f"http://{HOST}:{settings.metrics.port_of('standalone')}/metrics"
    operator, command = "(turned off)", f".venv/bin/distributor operator --config {file} orders"
    if settings.operator_api.secret is None:
        how = f"set DISTRIBUTOR_OPERATOR_API__SECRET (32 bytes or more) for `make run` and for {command}"
    else:
        operator, how = f"http://{HOST}:{settings.operator_api.port}", f"{command}, with the same secret"
    ours = [item for item in objects if item.held and item.bucket == "0:1"]
    assets = "\n".join(
        f"  {node}/api/v1/assets/{item.object_id:<5} {item.media_type:<26} {item.size:>13,} bytes  {item.name}"
        for item in ours
    )
    picture = next(item for item in ours if item.media_type.startswith("image/"))
    url = f"{node}/api/v1/assets/{picture.object_id}"
    return f"""
The node is up: {node}   (Ctrl-C stops it)

  {"http://" + HOST + ":" + str(source_port) + "/":<45} demo page: 20 viewers, one download, faults
  {dashboard or "(turned off)":<45} the node's own page
  {node + "/api/v1/status":<45} status of the node
  {metrics:<45} metrics for Prometheus
  {operator:<45} operator API: {how}

Objects (the first request is a miss, the next one a hit):
{assets}

Try:
  curl -sD - -o /dev/null {url}
  curl -sD - -o /dev/null -r 0-99 {url}
  .venv/bin/distributor top --config {file}
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="make run", description="A standalone node with demo objects.")
    parser.add_argument(
        "--port",
        type=port_number,
        default=FIRST_PUBLIC_PORT,
        help="public port; if it is in use, the next free one",
    )
    parser.add_argument(
        "--storage-node-port",
        type=port_number,
        default=FIRST_SOURCE_PORT,
        help="port of the demo page and the first storage node; if it is in use, the next free one",
    )
    parser.add_argument(
        "--catalog",
        choices=["manifest", "joystream"],
        default="manifest",
        help="joystream: with a demo Storage-Squid, as on the network",
    )
    parser.add_argument(
        "--data", type=Path, default=DEMO_DIRECTORY.parents[1] / "var" / "demo", help="directory of the cache"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
