"""`make soak`: mixed traffic with random kills and cuts; every invariant, all along and at the end.

python -m tests.chaos.soak --minutes 10 --seed 1
"""

from __future__ import annotations

import argparse
import asyncio
import random
import secrets
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

from distributor_node.services.demo.faults import Fault, Match
from distributor_node.services.demo.objects import MIB
from tests.chaos.clients import ClientPool
from tests.chaos.figures import record_result
from tests.chaos.harness import ChaosHarness, chaos_harness, frozen, mixed_objects
from tests.chaos.invariants import check_logs, wait_until_settled
from tests.servers.rabbitmq_server import RabbitServer
from tests.servers.redis_server import RedisServer

LIMIT = 24 * MIB
OBJECTS = mixed_objects(120)
REPORT_SECONDS = 30.0
Disruption = Callable[[ChaosHarness, random.Random], Awaitable[None]]


async def kill(chaos: ChaosHarness, rng: random.Random) -> None:
    """One process, or all of them."""
    victims = chaos.stack.processes if rng.random() < 0.1 else [rng.choice(chaos.stack.processes)]
    for process in victims:
        process.kill()
    await asyncio.sleep(rng.uniform(0, 2))
    for process in victims:
        process.start()
    await chaos.stack.ready()


async def stop(chaos: ChaosHarness, rng: random.Random) -> None:
    """In good order."""
    process = rng.choice(chaos.stack.processes)
    code = await process.stop(40)
    assert code == 0, f"{process.name} ended with {code}: {process.tail()}"
    process.start()
    await chaos.stack.ready()


async def freeze_process(chaos: ChaosHarness, rng: random.Random) -> None:
    with frozen(rng.choice([*chaos.stack.of("fetcher"), *chaos.stack.of("evictor")])):
        await asyncio.sleep(rng.uniform(0.5, 6))


async def cut(chaos: ChaosHarness, rng: random.Random) -> None:
    relays = (chaos.to_redis, chaos.to_rabbit, chaos.to_first, chaos.to_second)
    rng.choice(relays).cut()


async def degrade_connection(chaos: ChaosHarness, rng: random.Random) -> None:
    relay = rng.choice((chaos.to_redis, chaos.to_rabbit, chaos.to_first))
    match rng.randrange(4):
        case 0:
            relay.unresponsive = True
        case 1:
            relay.dropping_replies = True
        case 2:
            relay.refusing = True
            relay.cut()
        case _:
            relay.delay = rng.uniform(0.1, 1.5)
    await asyncio.sleep(rng.uniform(1, 8))
    relay.heal()


async def disrupt_redis(chaos: ChaosHarness, rng: random.Random) -> None:
    match rng.randrange(3):
        case 0:
            await chaos.redis.command("FLUSHALL")
        case 1:
            await asyncio.to_thread(chaos.redis.kill)
            await asyncio.sleep(rng.uniform(0, 3))
            await asyncio.to_thread(chaos.redis.start)
        case _:
            chaos.redis.freeze()
            await asyncio.sleep(rng.uniform(0.5, 5))
            chaos.redis.thaw()


async def disrupt_rabbitmq(chaos: ChaosHarness, rng: random.Random) -> None:
    if rng.random() < 0.5:
        await asyncio.to_thread(chaos.rabbit.kill)
        await asyncio.to_thread(chaos.rabbit.start)
    else:
        chaos.rabbit.freeze()
        await asyncio.sleep(rng.uniform(0.5, 8))
        chaos.rabbit.thaw()


async def inject_source_fault(chaos: ChaosHarness, rng: random.Random) -> None:
    """The first of two: the other one has everything, and is good."""
    kinds = (
        Fault(cut_after=rng.randrange(500_000)),
        Fault(hang_after=rng.randrange(500_000)),
        Fault(flip_byte_at=rng.randrange(1000)),
        Fault(status=500),
        Fault(hang_before_headers=True),
    )
    chaos.first.faults.replace([])
    chaos.first.faults.add(rng.choice(kinds), Match(endpoint="files"))
    await asyncio.sleep(rng.uniform(1, 6))
    chaos.first.faults.clear()


DISRUPTIONS: dict[Disruption, int] = {
    kill: 6, stop: 2, freeze_process: 3, cut: 4, degrade_connection: 3, disrupt_redis: 2, disrupt_rabbitmq: 1,
    inject_source_fault: 3,
}  # fmt: skip


async def soak(seconds: float, seed: int) -> None:
    """AssertionError says what did not hold."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        folder = Path(name)
        for part in ("redis", "rabbitmq", "node"):
            (folder / part).mkdir()
        redis = RedisServer(folder / "redis").start()
        try:
            with RabbitServer(folder / "rabbitmq") as rabbit:
                async with chaos_harness(folder / "node", redis, rabbit) as chaos:
                    await _soak(chaos, rng, seconds, seed)
        finally:
            redis.kill()


async def _soak(chaos: ChaosHarness, rng: random.Random, seconds: float, seed: int) -> None:
    clients = await chaos.up(OBJECTS, LIMIT, fetchers=2)
    chaos.stack.add("evictor")
    await chaos.stack.ready()
    clients.seed, clients.sources_lie, clients.pause = seed, True, 0.02
    done: Counter[str] = Counter()
    monitor = chaos.monitor_volume()
    until, report_at = time.monotonic() + seconds, time.monotonic() + REPORT_SECONDS
    async with monitor.running(), clients.running(8):
        while time.monotonic() < until:
            await asyncio.sleep(rng.uniform(0, 2))
            (disruption,) = rng.choices(list(DISRUPTIONS), list(DISRUPTIONS.values()))
            done[disruption.__name__] += 1
            with clients.fault(grace=8):
                await disruption(chaos, rng)
            _check(chaos, clients, monitor.peak)
            if time.monotonic() > report_at:
                report_at += REPORT_SECONDS
                print(f"{until - time.monotonic():5.0f} s left; {clients.summary()}", flush=True)  # noqa: T201
        await asyncio.sleep(10)
    _check(chaos, clients, monitor.peak)
    rest = await wait_until_settled(chaos, OBJECTS, timeout=180)
    record_result("soak", clients, seed=seed, seconds=seconds, troubles=done.total(), at_rest_after=rest)
    print(  # noqa: T201
        f"seed {seed}: {dict(done)}\n{clients.summary()}\nmost bytes on the volume {monitor.peak} of {LIMIT}"
        f" in {monitor.samples} looks; at rest after {rest:.1f} s; all invariants hold"
    )


def _check(chaos: ChaosHarness, clients: ClientPool, peak: int) -> None:
    clients.check()
    check_logs(chaos)
    assert peak <= LIMIT, f"{peak} bytes on the volume, {LIMIT} allowed"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument(
        "--seed", type=int, default=secrets.randbelow(1_000_000), help="repeats the same troubles"
    )
    arguments = parser.parse_args()
    print(f"soak: {arguments.minutes:g} minutes, --seed {arguments.seed}", flush=True)  # noqa: T201
    asyncio.run(soak(arguments.minutes * 60, arguments.seed))


if __name__ == "__main__":
    main()
