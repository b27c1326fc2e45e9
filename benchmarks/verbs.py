"""How much one Redis and one RabbitMQ of a cell take: `python -m benchmarks.verbs [--seconds N]`.

One process with 32 calls under way, on private servers. What it reaches is bounded by its own CPU time as much as by
theirs: several processes reach more together.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import tempfile
import time
from pathlib import Path

from benchmarks.store_verbs import PREFIX, StoreVerbs
from distributor_node.shared.adapters.queue_rabbitmq import RabbitJobQueue
from distributor_node.shared.adapters.state_common import StateTimeouts
from distributor_node.shared.adapters.state_redis import RedisStateStore
from distributor_node.shared.domain.jobs import Ack, FetchJob, JobOutcome, RetryPlan
from distributor_node.shared.domain.objects import ContentHash, MediaObject, ObjectId
from tests.servers.rabbitmq_server import RabbitServer
from tests.servers.redis_server import RedisServer

_CONCURRENCY = 32
_LIMIT = 10**12  # bytes


def _job(number: int) -> FetchJob:
    wanted = MediaObject(
        object_id=ObjectId(number),
        size=10**7,
        content_hash=ContentHash("sha256", bytes(32)),
        media_type="video/mp4",
        sources=tuple(f"https://node-{node}.example/api/v1/files/{number}" for node in range(3)),
    )
    return FetchJob(wanted, request_id="benchmark", published_at=time.time())


async def measure_queue(url: str, seconds: float) -> dict[str, float]:
    """Jobs published a second, with the broker's confirm, and jobs consumed and acknowledged a second."""
    queue = RabbitJobQueue(url, "benchmark", RetryPlan(), publish_timeout=10)
    await queue.open()
    try:
        numbers, published = itertools.count(1), 0
        deadline = time.perf_counter() + seconds

        async def publish() -> None:
            nonlocal published
            while time.perf_counter() < deadline:
                await queue.publish(_job(next(numbers)))
                published += 1

        began = time.perf_counter()
        await asyncio.gather(*(publish() for _ in range(_CONCURRENCY)))
        rate = published / (time.perf_counter() - began)
        consumed, ended = 0, asyncio.Event()

        async def handle(_: FetchJob) -> JobOutcome:
            nonlocal consumed
            consumed += 1
            if consumed >= published:
                ended.set()
            return Ack()

        async def lose(job: FetchJob, reason: str) -> None:
            raise RuntimeError(f"{job.object_id}: {reason}")

        began = time.perf_counter()
        consuming = asyncio.create_task(queue.consume(handle, _CONCURRENCY, lose))
        await asyncio.wait(
            {consuming, waiting := asyncio.create_task(ended.wait())}, return_when="FIRST_COMPLETED"
        )
        taken = time.perf_counter() - began
        waiting.cancel()
        consuming.cancel()
        await asyncio.wait({consuming, waiting})
        return {"publish_per_second": rate, "consume_per_second": consumed / taken}
    finally:
        await queue.close()


async def reconcile(url: str) -> None:
    """As an evictor does at its start, with an empty volume: before it no space can be reserved."""
    store = RedisStateStore(url, PREFIX, _LIMIT, StateTimeouts(operation_timeout=10.0))
    await store.open()
    try:
        term = await store.lead("benchmark", 600)
        if term is None:
            raise RuntimeError("a new Redis has a leader")
        await store.set_reconciled(term)
        await store.resign(term)
    finally:
        await store.close()


async def run(folder: Path, seconds: float) -> dict[str, float]:
    redis, rabbitmq = RedisServer(folder), RabbitServer(folder)
    redis.start()
    try:
        await reconcile(redis.url)
        figures = await StoreVerbs(redis.url, _LIMIT).measure()
    finally:
        redis.stop()
    rabbitmq.start()
    try:
        return figures | await measure_queue(rabbitmq.url, seconds)
    finally:
        rabbitmq.stop()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=5.0, help="of publishing")
    with tempfile.TemporaryDirectory() as folder:
        for name, rate in asyncio.run(run(Path(folder), parser.parse_args().seconds)).items():
            print(f"{name.replace('_', ' ')}: {rate:,.0f}")


if __name__ == "__main__":
    main()
