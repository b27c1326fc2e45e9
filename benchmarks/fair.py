"""Look-ups and downloads under load: a cold page, many clients, a flood of unknown ids, full slots, slow sources.

    make bench-fair                             # about six minutes
    make bench-fair ARGS="--stranger-rate 400"  # a flood that leaves some of the machine to others
    make bench-fair ARGS="--only lookups"       # or downloads
    make bench-fair ARGS="--only flood --beside 0.4"  # strangers ask another server: what sharing the CPUs costs alone

Look-ups: two API workers, Redis and RabbitMQ as real processes, in front of the demo squid. Requests are HEADs: what is
measured is the look-up alone. Downloads: see `fair_downloads.py`. Figures are counts and ratios within one run. Exit
code 1: a goal was missed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, suppress
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks import fair_downloads
from benchmarks.figures import GoalRow, percentile
from benchmarks.node import Node, RunningService
from benchmarks.processes import OwnProcess
from distributor_node.shared.adapters.volume.known_ids import NAME as KNOWN_IDS
from distributor_node.shared.adapters.volume.known_ids import POLL_INTERVAL
from tests.end_to_end.client import Answer, get
from tests.servers.redis_server import free_port

FIRST_ID = 1_000_000
OBJECTS = 5000
WORKERS = 2
CLIENTS, CLIENT_OBJECTS = 120, 1500
STRANGERS, NEW_OBJECTS = 200, 23
QUIET_PAUSE = (
    0.5  # seconds between two quiet requests: as in the flood, no process is warm from the one before
)


class Bench:
    """A node and its squid. `ids` are known to the squid, each used once."""

    def __init__(
        self,
        api: RunningService,
        squid_url: str,
        stranger_rate: float,
        viewer: ProcessPoolExecutor,
        strangers_url: str | None = None,
    ) -> None:
        """`stranger_rate`: requests a second of all strangers together at most; 0: as fast as they can.

        `viewer`: the process that asks for new objects. In that of the strangers, its answers would wait for theirs.
        `strangers_url`: what strangers ask in place of the node.
        """
        self._viewer = viewer
        self.strangers_url = strangers_url or api.assets_url
        self.stranger_pause = STRANGERS / stranger_rate if stranger_rate else 0.0
        self._api = api
        self._squid_url = squid_url
        self._ids = iter(range(FIRST_ID, FIRST_ID + OBJECTS))

    def take(self, count: int) -> list[str]:
        return [str(next(self._ids)) for _ in range(count)]

    async def head(self, object_id: str, client: str) -> Answer:
        """Ask once, in the name of a client."""
        return await head(self._api.assets_url + object_id, client)

    async def ask_one_by_one(self, count: int, pause: float) -> list[Answer]:
        """Ask for new objects from another process, with a pause in seconds before each."""
        urls = [self._api.assets_url + object_id for object_id in self.take(count)]
        return await asyncio.get_running_loop().run_in_executor(self._viewer, view, urls, pause)

    async def squid(self, method: str, path: str, body: Any = None) -> Any:
        def send() -> Any:
            raw = None if body is None else json.dumps(body).encode()
            request = urllib.request.Request(f"{self._squid_url}{path}", raw, method=method)
            with urllib.request.urlopen(request, timeout=10) as answer:
                return json.load(answer)

        return await asyncio.to_thread(send)

    async def begin(self, **faults: Any) -> None:
        """Set the squid's faults and clear its log."""
        await self.squid("PUT", "/faults", faults)
        await self.squid("DELETE", "/requests")

    async def queries(self) -> list[dict[str, Any]]:
        """The look-ups that the squid has received."""
        seen = (await self.squid("GET", "/requests"))["requests"]
        return [query for query in seen if query["operation"] in ("DataObject", "DataObjects")]


async def head(url: str, client: str) -> Answer:
    return await get(url, {"X-Forwarded-For": client}, method="HEAD", timeout=30)


def view(urls: Sequence[str], pause: float) -> list[Answer]:
    """Ask once for each, in the name of one client, with a pause in seconds before each."""

    async def ask() -> list[Answer]:
        answers = []
        for url in urls:
            await asyncio.sleep(pause)
            answers.append(await head(url, "203.0.113.7"))
        return answers

    return asyncio.run(ask())


def object_ids_of(query: dict[str, Any]) -> list[str]:
    variables = query["variables"]
    return variables["ids"] if "ids" in variables else [variables["id"]]


def statuses(answers: Sequence[Answer]) -> str:
    found = sorted({answer.status for answer in answers})
    return ", ".join(f"{sum(answer.status == status for answer in answers)} x {status}" for status in found)


async def cold_page(bench: Bench, _seconds: float) -> GoalRow:
    await bench.begin(latency=0.6)
    answers = await asyncio.gather(*(bench.head(object_id, "203.0.113.1") for object_id in bench.take(100)))
    queries, slowest = len(await bench.queries()), max(answer.took for answer in answers)
    served = all(answer.status == 200 for answer in answers)
    return GoalRow(
        "100 cold thumbnails, squid 0.6 s",
        f"{statuses(answers)}; slowest {slowest:.2f} s; {queries} queries",
        f"100 x 200, none above 2.5 s, at most {5 * WORKERS} queries (5 for each worker)",
        served and slowest <= 2.5 and queries <= 5 * WORKERS,
    )


async def many_clients(bench: Bench, _seconds: float) -> GoalRow:
    await bench.begin(latency=0.3)
    wanted = bench.take(CLIENT_OBJECTS)

    async def client(number: int) -> list[Answer]:
        mine = wanted[number::CLIENTS]
        return [await bench.head(object_id, f"203.0.113.{number + 1}") for object_id in mine]

    answers = [answer for mine in await asyncio.gather(*map(client, range(CLIENTS))) for answer in mine]
    queries = await bench.queries()
    asked = sum(len(object_ids_of(query)) for query in queries)
    used = sum(answer.status == 200 for answer in answers)
    return GoalRow(
        f"{CLIENTS} clients, {CLIENT_OBJECTS} objects, squid 0.3 s",
        f"{statuses(answers)}; {asked} objects asked for in {len(queries)} queries; {used / asked:.0%} used",
        "at least 95 % of the answers used",
        used >= 0.95 * asked,
    )


async def flood(bench: Bench, seconds: float) -> GoalRow:
    """Half of the quiet requests come before the flood, half after it: other work on the machine is in both."""
    await bench.begin(latency=0.05)
    quiet = await bench.ask_one_by_one(NEW_OBJECTS // 2, QUIET_PAUSE)
    await bench.begin(latency=0.05)
    over = asyncio.Event()
    sent = 0

    async def stranger(number: int) -> None:
        nonlocal sent
        while not over.is_set():
            sent += 1
            with suppress(OSError, TimeoutError):
                await head(f"{bench.strangers_url}{10**12 + number * 10**6 + sent}", "198.51.100.9")
            await asyncio.sleep(bench.stranger_pause)

    strangers = [asyncio.create_task(stranger(number)) for number in range(STRANGERS)]
    await asyncio.sleep(QUIET_PAUSE)
    answers = await bench.ask_one_by_one(NEW_OBJECTS, seconds / NEW_OBJECTS)
    over.set()
    await asyncio.gather(*strangers)
    starts = sorted(query["started_at"] for query in await bench.queries())
    densest = max((sum(1 for other in starts if start <= other < start + 1) for start in starts), default=0)
    quiet += await bench.ask_one_by_one(NEW_OBJECTS - len(quiet), QUIET_PAUSE)
    p95, quiet_p95 = (percentile([answer.took for answer in some], 0.95) for some in (answers, quiet))
    return GoalRow(
        f"{STRANGERS} connections of unknown ids for {seconds:g} s",
        f"new objects: {statuses(answers)}; p95 {p95 / quiet_p95:.1f} x the quiet one ({p95:.2f} s);"
        f" {sent / seconds:.0f} requests of strangers a second; at most {densest} queries in a second",
        f"{NEW_OBJECTS} x 200, p95 at most 3 x the quiet one, at most 20 queries a second",
        all(answer.status == 200 for answer in answers) and p95 <= 3 * quiet_p95 and densest <= 20,
    )


async def hanging(bench: Bench, _seconds: float) -> GoalRow:
    await bench.begin(hang=True)
    answers = await asyncio.gather(*(bench.head(object_id, "203.0.113.1") for object_id in bench.take(50)))
    slowest = max(answer.took for answer in answers)
    return GoalRow(
        "a hanging squid, 50 new objects",
        f"{statuses(answers)}; slowest {slowest:.2f} s",
        "503 within 1.5 s",
        all(answer.status == 503 for answer in answers) and slowest <= 1.5,
    )


async def new_object(bench: Bench, _seconds: float) -> GoalRow:
    (object_id,) = bench.take(1)
    await bench.begin(missing_objects=[object_id])
    first = await bench.head(object_id, "203.0.113.1")
    await asyncio.sleep(1)
    await bench.begin()
    known_at = time.monotonic()
    while (answer := await bench.head(object_id, "203.0.113.1")).status == 404:  # noqa: ASYNC110 — as a client polls
        await asyncio.sleep(0.2)
    took = time.monotonic() - known_at
    return GoalRow(
        "an object that is known 1 s after its 404",
        f"{first.status}, then {answer.status} after {took:.1f} s",
        "200 within 5 s",
        (first.status, answer.status) == (404, 200) and took <= 5,
    )


def answer_elsewhere(port: int, delay: float) -> None:
    """Serve in place of the node: 404 to every request, `delay` seconds late. Runs until killed."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            await asyncio.sleep(delay)
            writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
            await reader.read()
        writer.close()

    async def serve() -> None:
        async with await asyncio.start_server(answer, "127.0.0.1", port, backlog=1024) as server:
            await server.serve_forever()

    asyncio.run(serve())


Case = Callable[[Bench, float], Any]
CASES: tuple[Case, ...] = (cold_page, many_clients, flood, new_object, hanging)


def run(
    seconds: float, stranger_rate: float, cases: Sequence[Case] = CASES, beside: float | None = None
) -> list[GoalRow]:
    """`beside`: the strangers ask another server, which answers so many seconds late."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fair-")))
        port = free_port()
        command = [sys.executable, "-m", "distributor_node.services.demo.squid", "--port", str(port)]
        squid = OwnProcess("squid", [*command, "--objects", str(OBJECTS), str(FIRST_ID)], folder)
        stack.callback(squid.stop)
        squid.start().wait_listening(port)
        node = Node(
            folder,
            folder / "unused.yaml",
            DISTRIBUTOR_CATALOG__KIND="joystream",
            DISTRIBUTOR_CATALOG__REFUSE_PRIVATE_SOURCES="false",
            DISTRIBUTOR_CATALOG__SQUID=f"http://127.0.0.1:{port}/graphql",
            DISTRIBUTOR_PUBLIC_API__WORKERS=str(WORKERS),
            DISTRIBUTOR_PUBLIC_API__TRUSTED_PROXIES='["127.0.0.1"]',
            DISTRIBUTOR_LOG__LEVEL="error",
        )
        stack.callback(node.close)
        node.start_servers()
        node.start("evictor")
        viewer = stack.enter_context(ProcessPoolExecutor(1, get_context("spawn")))
        strangers_url = None
        if beside is not None:
            other_port = free_port()
            elsewhere = get_context("spawn").Process(target=answer_elsewhere, args=(other_port, beside))
            elsewhere.start()
            stack.callback(elsewhere.kill)
            strangers_url = f"http://127.0.0.1:{other_port}/"
        api = node.start("api")
        bench = Bench(api, f"http://127.0.0.1:{port}", stranger_rate, viewer, strangers_url)

        async def measure() -> list[GoalRow]:
            # The evictor reads the squid's list, and each API process what it has written.
            while not (node.volume / KNOWN_IDS).exists():  # noqa: ASYNC110
                await asyncio.sleep(0.1)
            await asyncio.sleep(POLL_INTERVAL + 1)
            return [await case(bench, seconds) for case in cases]

        return asyncio.run(measure())


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.fair", description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="of the flood (default: %(default)g)")
    parser.add_argument(
        "--stranger-rate",
        type=float,
        default=0.0,
        help="requests a second of all strangers at most (default: as fast as they can)",
    )
    parser.add_argument(
        "--beside",
        type=float,
        metavar="SECONDS",
        help="the strangers ask another server, which answers each so late: what sharing the machine costs alone",
    )
    parser.add_argument(
        "--only",
        choices=("lookups", "flood", "downloads"),
        help="a part (default: all of look-ups and downloads)",
    )
    options = parser.parse_args()
    rows: list[GoalRow] = []
    if options.only != "downloads":
        cases = (flood,) if options.only == "flood" else CASES
        rows += run(options.seconds, options.stranger_rate, cases, options.beside)
    if options.only in (None, "downloads"):
        rows += asyncio.run(fair_downloads.measure())
    print("| case | result | goal | met |", "|---|---|---|---|", sep="\n")
    for row in rows:
        print(f"| {row.case} | {row.result} | {row.goal} | {'yes' if row.met else 'NO'} |")
    return 0 if all(row.met for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
