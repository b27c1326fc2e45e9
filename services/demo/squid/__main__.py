"""The command `python -m distributor_node.services.demo.squid`."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from contextlib import AsyncExitStack
from pathlib import Path

import structlog
import uvloop

from distributor_node.services.demo.manifest import DEMO_DIRECTORY
from distributor_node.services.demo.objects import demo_objects, generated_object
from distributor_node.services.demo.squid.resolvers import SquidFaults
from distributor_node.services.demo.squid.sdl import BIGINT_WORKER
from distributor_node.services.demo.squid.server import TestChain, TestSquid

logger = structlog.get_logger()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="distributor_node.services.demo.squid",
        description="A Storage-Squid with the demo's objects. PUT /faults injects faults.",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=4352, help="0: any free port (default: %(default)s)")
    parser.add_argument(
        "--chain-port", type=int, default=0, help="port of the chain's websocket; 0: any free port (default)"
    )
    parser.add_argument(
        "--node",
        action="append",
        help="endpoint of a storage node, without api/v1; may be repeated (default: http://127.0.0.1:3390)",
    )
    parser.add_argument(
        "--worker",
        action="append",
        type=_worker,
        default=[],
        metavar="ID=BUCKET,…",
        help="a worker and the distribution buckets it operates, such as 7=0:1; may be repeated",
    )
    parser.add_argument("--bags", type=int, default=2, help="bags in each bucket (default: %(default)s)")
    parser.add_argument(
        "--bigint-worker",
        action="store_true",
        help="make the ids of workers a BigInt, as the next squid does",
    )
    parser.add_argument(
        "--slow-status",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="answer questions about the squid's own status after so long",
    )
    parser.add_argument(
        "--media", type=Path, default=DEMO_DIRECTORY / "media", help="directory of <id>-<name>.<ext>"
    )
    parser.add_argument(
        "--objects",
        nargs=2,
        type=int,
        default=(0, 1),
        metavar=("COUNT", "FIRST"),
        help="so many small objects more, with ids from FIRST",
    )
    parser.add_argument(
        "--print-port",
        action="store_true",
        help="print both ports on one line of standard output once listening",
    )
    return parser


def _worker(text: str) -> tuple[int, list[str]]:
    number, equals, buckets = text.partition("=")
    if not number.isdecimal() or not equals:
        raise argparse.ArgumentTypeError(f"expected ID=BUCKET,BUCKET, such as 7=0:1, got {text!r}")
    return int(number), buckets.split(",")


async def serve(options: argparse.Namespace) -> None:
    """Serve until SIGINT or SIGTERM."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    count, first = options.objects
    more = [generated_object(str(number), 1000) for number in range(first, first + count)]
    squid = TestSquid(
        [*demo_objects(options.media), *more],
        options.node or ["http://127.0.0.1:3390"],
        workers=dict(options.worker),
        bags_per_bucket=options.bags,
    )
    schema = BIGINT_WORKER if options.bigint_worker else "current"
    squid.faults = SquidFaults(schema=schema, latency=options.slow_status, operations=("Status",))
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(squid.run(options.host, options.port))
        chain = await stack.enter_async_context(TestChain().run(options.host, options.chain_port))
        if options.print_port:
            print(squid.port, chain.url.rpartition(":")[2], flush=True)
        logger.info("squid_listening", url=squid.url, chain=chain.url)
        await stop.wait()
    logger.info("squid_stopped")


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and serve."""
    options = _parser().parse_args(arguments)
    # Logs go to standard error: standard output is for --print-port.
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(file=sys.stderr))
    uvloop.run(serve(options))


if __name__ == "__main__":
    main()
