"""The storage node as a process: `python -m distributor_node.services.demo.storage_node`."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from pathlib import Path

import structlog
import uvloop

from distributor_node.services.demo.manifest import DEMO_DIRECTORY, write_manifest
from distributor_node.services.demo.objects import demo_objects
from distributor_node.services.demo.storage_node import Site, StorageNode

logger = structlog.get_logger()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="distributor_node.services.demo.storage_node",
        description="A storage node with the demo's objects and page; PUT /faults makes it misbehave.",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=3390, help="0 takes a free one (default: %(default)s)")
    parser.add_argument(
        "--media", type=Path, default=DEMO_DIRECTORY / "media", help="directory of <id>-<name>.<ext>"
    )
    parser.add_argument(
        "--page", type=Path, default=DEMO_DIRECTORY / "page" / "index.html", help="the demo page"
    )
    parser.add_argument(
        "--node-url",
        default="http://127.0.0.1:3334",
        help="the distributor node the page asks (default: %(default)s)",
    )
    parser.add_argument(
        "--write-manifest", type=Path, metavar="FILE", help="write a manifest with this node's port"
    )
    parser.add_argument(
        "--public-url",
        help="how the distributor node reaches this process, for the manifest (default: host and port)",
    )
    parser.add_argument(
        "--print-port", action="store_true", help="print the port on standard output once listening"
    )
    return parser


async def serve(options: argparse.Namespace) -> None:
    """Serve until SIGINT or SIGTERM."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    objects = demo_objects(options.media)
    site = Site(options.page, options.node_url, tuple(objects))
    async with StorageNode(objects, site=site).run(options.host, options.port) as node:
        if options.write_manifest is not None:
            public_url = (options.public_url or node.url).rstrip("/")
            write_manifest(options.write_manifest, objects, f"{public_url}/api/v1/files/")
        if options.print_port:
            print(node.port, flush=True)
        logger.info(
            "storage_node_listening", url=node.url, objects=len(node.objects), node_url=options.node_url
        )
        await stop.wait()
    logger.info("storage_node_stopped")


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and serve."""
    options = _parser().parse_args(arguments)
    # Standard output belongs to --print-port.
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(file=sys.stderr))
    uvloop.run(serve(options))
