"""What a hit costs by way of a peer: `python -m benchmarks.hops [--requests N]`.

Two standalone nodes on this machine are one fleet. One of them is the home of all objects, and has them. The same
objects are asked for at the home, and at the other node, which passes them through: alternately, on one kept connection
each, one request at a time. Needs a quiet machine.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from distributor_node.services.demo.objects import generated_object
from distributor_node.services.demo.storage_node import StorageNode
from distributor_node.shared.domain.peers import Ring
from tests.end_to_end.fleet import KIB, Fleet
from tests.waiting import eventually

SIZES = (10 * KIB, 100 * KIB, 1024 * KIB, 8 * 1024 * KIB)
_OBJECTS = 20  # of each size


class Client:
    """One kept connection."""

    def __init__(self, base: str) -> None:
        self._connection = http.client.HTTPConnection(base.removeprefix("http://"))

    def ask(self, object_id: str) -> tuple[float, float]:
        """Returns the seconds to the head of the response, and to its end."""
        began = time.perf_counter()
        self._connection.request("GET", f"/api/v1/assets/{object_id}")
        response = self._connection.getresponse()
        first = time.perf_counter() - began
        body = response.read()
        if response.status != 200 or not body:
            raise RuntimeError(
                f"{object_id}: expected 200 and a body, got {response.status}, {len(body)} bytes"
            )
        return first, time.perf_counter() - began


def measure(home: str, other: str, ids: Sequence[str], requests: int) -> str:
    """Return one row of a Markdown table, without the size."""
    clients = {"home": Client(home), "peer": Client(other)}
    times: dict[str, list[tuple[float, float]]] = {"home": [], "peer": []}
    for number in range(-50, requests):
        for name, client in clients.items():
            taken = client.ask(ids[number % len(ids)])
            if number >= 0:
                times[name].append(taken)
    cells = []
    for place in (0, 1):
        for share in (0.5, 0.95):
            values = [
                1000 * statistics.quantiles([one[place] for one in times[name]], n=100)[int(100 * share) - 1]
                for name in clients
            ]
            cells.append(f"{values[0]:.2f} / {values[1]:.2f}: +{values[1] - values[0]:.2f}")
    return " | ".join(cells)


async def run(folder: Path, requests: int) -> None:
    async with StorageNode([]).run() as far:
        fleet = Fleet(folder, ("memory://", "memory://"), far)
        cells = [fleet.new_cell(1 << 30) for _ in range(2)]
        fleet.join(cells, DISTRIBUTOR_PEERS__HOT_VIEWS="1000000")
        bases = fleet.bases
        ring, number = Ring(dict.fromkeys(bases, 1.0)), 0
        ids: dict[int, list[str]] = {size: [] for size in SIZES}
        objects = []
        for size in SIZES:
            while len(ids[size]) < _OBJECTS:
                number += 1
                if ring.home(str(number)) == bases[0]:
                    ids[size].append(str(number))
                    objects.append(generated_object(str(number), size))
        fleet.publish(objects)
        try:
            for cell in cells:
                cell.add("standalone")
            await asyncio.gather(*(cell.ready() for cell in cells))
            for item in objects:
                if not await fleet.ask(0, item.object_id):
                    raise RuntimeError(f"{item.object_id} did not come")
            await eventually(lambda: len(fleet.stored(0)) == len(objects), pause=0.1)
            print(
                "| object | head, median | head, 95 % | whole, median | whole, 95 % |\n|---|---|---|---|---|"
            )
            for size in SIZES:
                row = await asyncio.to_thread(measure, bases[0], bases[1], ids[size], requests)
                print(f"| {size // KIB} KiB | {row} |", flush=True)
            if fleet.stored(1):
                raise RuntimeError("the other node has stored what it should pass through")
        finally:
            for cell in cells:
                cell.kill_all()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=1000, help="of each size at each node")
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(run(Path(folder), parser.parse_args().requests))


if __name__ == "__main__":
    main()
