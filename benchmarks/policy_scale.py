"""What a million objects cost the evictor: `python -m benchmarks.policy_scale [--objects N] [--policy NAME]`.

Memory is what the allocator handed out (tracemalloc) and what the process grew by (resident set), ids and everything
else included. Times are medians over batches, as wall-clock time of one thread. Rebuilding is what a new leader does:
all entries from Redis into a fresh policy; what the process grows by then is measured in a process of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import multiprocessing
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from random import Random

from benchmarks.store_verbs import PREFIX, redis_memory
from distributor_node.services.evictor.index import EvictionIndex
from distributor_node.shared.adapters.state_common import StateTimeouts
from distributor_node.shared.adapters.state_redis import RedisStateStore
from distributor_node.shared.adapters.volume import Volume
from distributor_node.shared.domain.eviction import (
    POLICY_NAMES,
    EvictionPolicy,
    Gdsf,
    PolicyEntry,
    PriorityBasis,
    make_policy,
)
from distributor_node.shared.domain.eviction.gdsf import priority_above_inflation
from distributor_node.shared.domain.eviction.policy import FIRST_COST_FACTOR
from distributor_node.shared.domain.objects import ObjectId
from distributor_node.shared.ports.state_store import IndexEntry, PolicyState
from distributor_node.shared.runtime.process import mmap_large_blocks
from tests.servers.redis_server import RedisServer

EPOCH = 1_700_000_000.0
BATCHES, BATCH = 300, 100
ADOPTION_BATCH = 1000
MEAN_VIEW = 1e6  # bytes
BASIS = PriorityBasis(
    policy=Gdsf.mark, miss_cost=FIRST_COST_FACTOR * MEAN_VIEW, views=1.0, viewed_bytes=MEAN_VIEW
)
"""As gdsf leaves it. By another one a new leader translates all priorities and writes them."""


def entries(count: int, first: int, random: Random, now: float) -> Iterator[PolicyEntry]:
    """Sizes from 20 KB to 2 GB, evenly on a logarithmic scale; ids of eight digits."""
    for number in range(first, first + count):
        size = int(20_000 * 10 ** random.uniform(0, 5))
        yield PolicyEntry(ObjectId(str(10_000_000 + number)), size, 1, now - random.uniform(0, 1e6))


def as_index_entry(entry: PolicyEntry) -> IndexEntry:
    """With the priority that gdsf gives it."""
    priority = priority_above_inflation(entry.size, BASIS.first_weight, BASIS.miss_cost)
    return IndexEntry(entry.object_id, entry.size, entry.frequency, entry.last_access, priority)


def filled(name: str, count: int) -> EvictionPolicy:
    """One object after the other, as a new leader does."""
    policy = make_policy(name)
    policy.restore((), PriorityBasis())
    for entry in entries(count, 0, Random(1), EPOCH):
        policy.add(entry)
    return policy


def resident_bytes() -> int:
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * 4096


def measure_memory(name: str, count: int) -> tuple[float, float]:
    """Bytes an object: allocated, and grown by."""
    mmap_large_blocks()  # as the evictor does
    gc.collect()
    before = resident_bytes()
    policy = filled(name, count)
    grown = resident_bytes() - before
    del policy
    gc.collect()
    tracemalloc.start()
    policy = filled(name, count)
    allocated = tracemalloc.get_traced_memory()[0]
    del policy
    tracemalloc.stop()
    return allocated / count, grown / count


def measure_hit(policy: EvictionPolicy, ids: list[ObjectId], random: Random) -> float:
    """Microseconds."""
    times = []
    for number in range(BATCHES):
        batch = random.choices(ids, k=BATCH)
        begun = time.perf_counter()
        for object_id in batch:
            policy.access(object_id, 1, EPOCH + number)
        times.append((time.perf_counter() - begun) / BATCH * 1e6)
    return statistics.median(times)


def measure_evict_and_add(policy: EvictionPolicy, count: int, random: Random, at_once: int) -> float:
    """Microseconds for one object evicted and one added, when `at_once` victims are chosen at a time."""
    times = []
    for number in range(BATCHES):
        now = EPOCH + 1000 + number
        newcomers = list(entries(at_once, count + number * at_once, random, now))
        begun = time.perf_counter()
        for victim in policy.victims(2**60, now, at_most=at_once):
            policy.remove(victim.object_id, evicted=True)
        for entry in newcomers:
            policy.store(entry.object_id, entry.size, entry.last_access)
        times.append((time.perf_counter() - begun) / at_once * 1e6)
    return statistics.median(times)


async def fill_store(url: str, count: int) -> float:
    """Put all objects into the state store's index, as reconciliation does; bytes of Redis for each."""
    empty = await redis_memory(url)
    state = RedisStateStore(url, PREFIX, 2**62, StateTimeouts(operation_timeout=60.0))
    await state.open()
    try:
        term = await state.lead("benchmark", 3600)
        if term is None:
            raise RuntimeError("cannot lead: another evictor holds the leadership in this Redis")
        remaining = entries(count, 0, Random(2), EPOCH)
        while batch := [as_index_entry(entry) for entry in islice(remaining, ADOPTION_BATCH)]:
            await state.adopt_many(term, batch)
        await state.save_policy(term, [], PolicyState(BASIS))
    finally:
        await state.close()
    return (await redis_memory(url) - empty) / count


async def take_over(name: str, url: str, folder: Path, count: int) -> tuple[EvictionPolicy, float, float]:
    """The policy as a new leader builds it from the store, the seconds that takes, and the bytes an object that the
    process grew by, the reader of the store included."""
    gc.collect()
    before = resident_bytes()
    state = RedisStateStore(url, PREFIX, 2**62, StateTimeouts(operation_timeout=60.0))
    volume = Volume(folder)
    await state.open()
    try:
        index = EvictionIndex(state, volume, lambda: make_policy(name))
        begun = time.perf_counter()
        await index.load()
        seconds = time.perf_counter() - begun
        grown = resident_bytes() - before
    finally:
        volume.close()
        await state.close()
    if len(index.policy) != count:
        raise RuntimeError(f"{len(index.policy)} of {count} objects taken over")
    return index.policy, seconds, grown / count


def measure_take_over(name: str, count: int, url: str, folder: Path) -> tuple[float, ...]:
    mmap_large_blocks()  # as the evictor does
    policy, rebuild, grown = asyncio.run(take_over(name, url, folder, count))
    ids, random = list(policy.ids()), Random(2)
    hit = measure_hit(policy, ids, random)
    evict = measure_evict_and_add(policy, count, random, 100)
    one_by_one = measure_evict_and_add(policy, count + BATCHES * 100, random, 1)
    return grown, hit, evict, one_by_one, rebuild


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--objects", type=int, default=1_000_000)
    parser.add_argument("--policy", choices=POLICY_NAMES, action="append")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="policy-scale-") as place, ExitStack() as resources:
        folder = Path(place)
        redis = RedisServer(folder).start()
        resources.callback(redis.stop)
        Volume(folder / "volume").prepare()
        in_redis = asyncio.run(fill_store(redis.url, arguments.objects))
        print(
            f"In Redis: {in_redis:.0f} bytes an object (goal: at most 100).\n\n"
            "| policy | objects | bytes an object, allocated | resident | resident after a take-over "
            "| hit, µs | evict + add, µs | one by one, µs | rebuild, s |\n|---|---|---|---|---|---|---|---|---|"
        )
        names = arguments.policy or POLICY_NAMES
        count = arguments.objects
        # A process each: memory that was given back must not serve the next measurement unseen.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as processes:
            for name in names:
                memory = processes.submit(measure_memory, name, count).result()
                taken = processes.submit(
                    measure_take_over, name, count, redis.url, folder / "volume"
                ).result()
                figures = " | ".join(f"{figure:.1f}" for figure in (*memory, *taken))
                print(f"| {name} | {count} | {figures} |", flush=True)
        print(
            "| goal, for a million | | | at most 200 | at most 210 | at most 5 | at most 22 | | at most 10 |"
        )


if __name__ == "__main__":
    main()
