"""What a million objects cost the evictor: `python -m benchmarks.policy_scale [--objects N] [--policy NAME]`.

Memory is what the allocator handed out (tracemalloc) and what the process grew by (resident set), ids and everything
else included. Times are medians over batches, as wall-clock time of one thread.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import statistics
import time
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from random import Random

from shared.domain.eviction import POLICY_NAMES, EvictionPolicy, PolicyEntry, make_policy
from shared.domain.objects import ObjectId

EPOCH = 1_700_000_000.0
BATCHES, BATCH = 300, 100


def entries(count: int, first: int, random: Random, now: float) -> Iterator[PolicyEntry]:
    """Sizes from 20 KB to 2 GB, evenly on a logarithmic scale; ids of eight digits."""
    for number in range(first, first + count):
        size = int(20_000 * 10 ** random.uniform(0, 5))
        yield PolicyEntry(ObjectId(str(10_000_000 + number)), size, 1, now - random.uniform(0, 1e6))


def resident_bytes() -> int:
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * 4096


def measure_memory(name: str, count: int) -> tuple[float, float]:
    """Bytes an object: allocated, and grown by."""
    gc.collect()
    before = resident_bytes()
    policy = make_policy(name)
    policy.restore(entries(count, 0, Random(1), EPOCH), 0.0)
    grown = resident_bytes() - before
    del policy
    gc.collect()
    tracemalloc.start()
    policy = make_policy(name)
    policy.restore(entries(count, 0, Random(1), EPOCH), 0.0)
    allocated = tracemalloc.get_traced_memory()[0]
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
            policy.add(entry)
        times.append((time.perf_counter() - begun) / at_once * 1e6)
    return statistics.median(times)


def measure(name: str, count: int) -> str:
    allocated, grown = measure_memory(name, count)
    policy, random = make_policy(name), Random(2)
    begun = time.perf_counter()
    policy.restore(entries(count, 0, random, EPOCH), 0.0)
    rebuild = time.perf_counter() - begun
    ids = [entry.object_id for entry in policy.dump()]
    hit = measure_hit(policy, ids, random)
    evict = measure_evict_and_add(policy, count, random, 100)
    one_by_one = measure_evict_and_add(policy, count + BATCHES * 100, random, 1)
    figures = [allocated, grown, hit, evict, one_by_one, rebuild]
    return f"| {name} | {count} | {' | '.join(f'{figure:.1f}' for figure in figures)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--objects", type=int, default=1_000_000)
    parser.add_argument("--policy", choices=POLICY_NAMES, action="append")
    arguments = parser.parse_args()
    print(
        "| policy | objects | bytes an object, allocated | resident | hit, µs | evict + add, µs | one by one, µs "
        "| rebuild, s |\n|---|---|---|---|---|---|---|---|"
    )
    names = arguments.policy or POLICY_NAMES
    # A process each: memory that one policy gave back must not serve the next unseen.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as processes:
        for line in processes.map(measure, names, [arguments.objects] * len(names)):
            print(line, flush=True)


if __name__ == "__main__":
    main()
