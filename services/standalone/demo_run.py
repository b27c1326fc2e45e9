"""`make run`: a standalone node on this machine, with a demo storage node beside it and URLs to try."""

from __future__ import annotations

import argparse
import socket
import sys
from pathlib import Path

import yaml

from services.demo.control import Site
from services.demo.manifest import DEMO_DIRECTORY, write_manifest
from services.demo.objects import DemoObject, demo_objects
from services.demo.storage_node import StorageNode
from services.standalone.wiring import run_standalone
from shared.domain.errors import ConfigurationError
from shared.runtime.run_service import MISCONFIGURED, ServiceScope, run_service
from shared.settings import Settings, load_settings

HOST = "127.0.0.1"
FIRST_PUBLIC_PORT, FIRST_SOURCE_PORT = 3334, 3390
_PORTS_TRIED = 200


def main(arguments: list[str] | None = None) -> int:
    """Run until Ctrl-C; the exit code."""
    options = _parser().parse_args(arguments)
    folder: Path = options.data
    manifest = folder / "manifest.yaml"
    try:
        source_port = free_port_from(FIRST_SOURCE_PORT)
        objects = demo_objects(DEMO_DIRECTORY / "media")
        write_manifest(manifest, objects, f"http://{HOST}:{source_port}/api/v1/files/")
        settings = demo_settings(folder, manifest, free_port_from(options.port))
    except ConfigurationError as error:
        print(f"The demo cannot start:\n{error}", file=sys.stderr)
        return MISCONFIGURED

    async def serve(scope: ServiceScope) -> None:
        node_url = f"http://{HOST}:{settings.public_api.port}"
        site = Site(DEMO_DIRECTORY / "page" / "index.html", node_url, tuple(objects))
        source = StorageNode(objects, site=site)
        await scope.resources.enter_async_context(source.run(HOST, source_port))
        await run_standalone(
            scope, settings, lambda port: print(greeting(port, source_port, objects), flush=True)
        )

    code = run_service(serve, name="demo", shutdown_deadline=settings.shutdown_deadline, log=settings.log)
    if code == 0:
        print("Stopped. What was cached stays for the next start.")
    return code


def demo_settings(folder: Path, manifest: Path, port: int) -> Settings:
    """Settings of the demo, as a file to look at; the environment wins, so that any of them can be tried out."""
    fields = {
        "id": "demo",
        "environment": "demo",
        "buckets": ["0:1"],
        "public_api": {"host": HOST, "port": port},
        "catalog": {"kind": "manifest", "manifest": str(manifest)},
        "storage": {"path": str(folder / "volume"), "limit": "4G"},
        "shutdown_deadline": 10,
        "log": {"level": "warning", "format": "console"},
    }
    file = folder / "settings.yaml"
    file.write_text(yaml.safe_dump(fields, sort_keys=False), encoding="utf-8")
    return load_settings(file)


def free_port_from(first: int) -> int:
    """The first port from `first` on that is free now."""
    for port in range(first, first + _PORTS_TRIED):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            return port
    raise ConfigurationError(f"no free port from {first} to {first + _PORTS_TRIED - 1}")


def greeting(port: int, source_port: int, objects: list[DemoObject]) -> str:
    """What to try, with URLs that work."""
    node = f"http://{HOST}:{port}"
    ours = [item for item in objects if item.held and item.bucket == "0:1"]
    assets = "\n".join(
        f"  {node}/api/v1/assets/{item.object_id:<5} {item.media_type:<26} {item.size:>13,} bytes  {item.name}"
        for item in ours
    )
    picture = next(item for item in ours if item.media_type.startswith("image/"))
    url = f"{node}/api/v1/assets/{picture.object_id}"
    return f"""
The node is up: {node}   (Ctrl-C stops it)

  {"http://" + HOST + ":" + str(source_port) + "/":<45} the demo page: pictures, video, subtitles, through the node
  {node + "/api/v1/status":<45} what the node says of itself
  {node + "/metrics":<45} for Prometheus

Objects (the first request is a miss, the next one a hit):
{assets}

Try:
  curl -sD - -o /dev/null {url}
  curl -sD - -o /dev/null -r 0-99 {url}
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="make run", description="A standalone node with demo objects.")
    parser.add_argument(
        "--port", type=int, default=FIRST_PUBLIC_PORT, help="public port, or the next free one"
    )
    parser.add_argument(
        "--data", type=Path, default=DEMO_DIRECTORY.parents[1] / "var" / "demo", help="where the cache lives"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
