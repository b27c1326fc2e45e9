"""The source of all contenders: the demo storage node, holding the measured objects, as a process of its own.

python -m benchmarks.origin --port 3390 64k:65536:2000:20000000 …
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from pathlib import Path

import uvloop

from benchmarks.dataset import Group
from benchmarks.processes import OwnProcess
from distributor_node.services.demo.storage_node import StorageNode
from tests.servers.redis_server import free_port


class Origin:
    """A running source."""

    def __init__(self, folder: Path, chosen: list[Group]) -> None:
        self.port = free_port()
        texts = [group.to_text() for group in chosen]
        command = [sys.executable, "-m", "benchmarks.origin", "--port", str(self.port), *texts]
        self.process = OwnProcess("origin", command, folder)

    @property
    def files_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/api/v1/files/"

    @property
    def log_url(self) -> str:
        """Answers GET with the requests seen, DELETE forgets them."""
        return f"http://127.0.0.1:{self.port}/requests"

    def start(self) -> None:
        self.process.start().wait_listening(self.port)

    def stop(self) -> None:
        self.process.stop()


async def serve(port: int, chosen: list[Group]) -> None:
    """Until SIGTERM."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    objects = [item for group in chosen for item in group.objects()]
    async with StorageNode(objects).run(port=port):
        await stop.wait()


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.origin", description="A source of generated objects.")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("groups", nargs="+", type=Group.from_text, metavar="NAME:BYTES:COUNT:FIRST")
    options = parser.parse_args()
    uvloop.run(serve(options.port, options.groups))


if __name__ == "__main__":
    main()
