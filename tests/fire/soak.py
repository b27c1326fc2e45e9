"""`make soak`: mixed traffic with random kills and cuts; every invariant, all along and at the end.

python -m tests.fire.soak --minutes 10 --seed 1
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

from services.demo.knobs import Behaviour, Match
from services.demo.objects import MIB
from tests.fire.crew import Crew
from tests.fire.figures import note
from tests.fire.inspection import check_logs, settled
from tests.fire.world import FireWorld, fire_world, frozen, mixed_objects
from tests.servers.rabbitmq_server import RabbitServer
from tests.servers.redis_server import RedisServer

LIMIT = 24 * MIB
OBJECTS = mixed_objects(120)
REPORT_SECONDS = 30.0
Trouble = Callable[[FireWorld, random.Random], Awaitable[None]]


async def kill(fire: FireWorld, chance: random.Random) -> None:
    """One process, or all of them."""
    victims = fire.stack.processes if chance.random() < 0.1 else [chance.choice(fire.stack.processes)]
    for process in victims:
        process.kill()
    await asyncio.sleep(chance.uniform(0, 2))
    for process in victims:
        process.start()
    await fire.stack.ready()


async def stop(fire: FireWorld, chance: random.Random) -> None:
    """In good order."""
    process = chance.choice(fire.stack.processes)
    code = await process.stop(40)
    assert code == 0, f"{process.name} ended with {code}: {process.tail()}"
    process.start()
    await fire.stack.ready()


async def stand_still(fire: FireWorld, chance: random.Random) -> None:
    with frozen(chance.choice([*fire.stack.of("fetcher"), *fire.stack.of("evictor")])):
        await asyncio.sleep(chance.uniform(0.5, 6))


async def cut(fire: FireWorld, chance: random.Random) -> None:
    relays = (fire.to_redis, fire.to_rabbit, fire.to_first, fire.to_second)
    chance.choice(relays).cut()


async def bad_line(fire: FireWorld, chance: random.Random) -> None:
    relay = chance.choice((fire.to_redis, fire.to_rabbit, fire.to_first))
    match chance.randrange(4):
        case 0:
            relay.deaf = True
        case 1:
            relay.losing_replies = True
        case 2:
            relay.refusing = True
            relay.cut()
        case _:
            relay.delay = chance.uniform(0.1, 1.5)
    await asyncio.sleep(chance.uniform(1, 8))
    relay.heal()


async def hurt_redis(fire: FireWorld, chance: random.Random) -> None:
    match chance.randrange(3):
        case 0:
            await fire.redis.command("FLUSHALL")
        case 1:
            await asyncio.to_thread(fire.redis.kill)
            await asyncio.sleep(chance.uniform(0, 3))
            await asyncio.to_thread(fire.redis.start)
        case _:
            fire.redis.freeze()
            await asyncio.sleep(chance.uniform(0.5, 5))
            fire.redis.thaw()


async def hurt_rabbitmq(fire: FireWorld, chance: random.Random) -> None:
    if chance.random() < 0.5:
        await asyncio.to_thread(fire.rabbit.kill)
        await asyncio.to_thread(fire.rabbit.start)
    else:
        fire.rabbit.freeze()
        await asyncio.sleep(chance.uniform(0.5, 8))
        fire.rabbit.thaw()


async def spoil_source(fire: FireWorld, chance: random.Random) -> None:
    """The first of two: the other one has everything, and is good."""
    kinds = (
        Behaviour(cut_after=chance.randrange(500_000)),
        Behaviour(hang_after=chance.randrange(500_000)),
        Behaviour(flip_byte_at=chance.randrange(1000)),
        Behaviour(status=500),
        Behaviour(hang_before_headers=True),
    )
    fire.first.knobs.replace([])
    fire.first.knobs.add(chance.choice(kinds), Match(endpoint="files"))
    await asyncio.sleep(chance.uniform(1, 6))
    fire.first.knobs.clear()


TROUBLES: dict[Trouble, int] = {
    kill: 6, stop: 2, stand_still: 3, cut: 4, bad_line: 3, hurt_redis: 2, hurt_rabbitmq: 1, spoil_source: 3,
}  # fmt: skip


async def soak(seconds: float, seed: int) -> None:
    """AssertionError says what did not hold."""
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        folder = Path(name)
        for part in ("redis", "rabbitmq", "node"):
            (folder / part).mkdir()
        redis = RedisServer(folder / "redis").start()
        try:
            with RabbitServer(folder / "rabbitmq") as rabbit:
                async with fire_world(folder / "node", redis, rabbit) as fire:
                    await _soak(fire, chance, seconds, seed)
        finally:
            redis.kill()


async def _soak(fire: FireWorld, chance: random.Random, seconds: float, seed: int) -> None:
    crew = await fire.up(OBJECTS, LIMIT, fetchers=2)
    fire.stack.add("evictor")
    await fire.stack.ready()
    crew.seed, crew.sources_lie, crew.pause = seed, True, 0.02
    done: Counter[str] = Counter()
    watch = fire.watch()
    until, report_at = time.monotonic() + seconds, time.monotonic() + REPORT_SECONDS
    async with watch.watching(), crew.at_work(8):
        while time.monotonic() < until:
            await asyncio.sleep(chance.uniform(0, 2))
            (trouble,) = chance.choices(list(TROUBLES), list(TROUBLES.values()))
            done[trouble.__name__] += 1
            with crew.fault(grace=8):
                await trouble(fire, chance)
            _check(fire, crew, watch.highest)
            if time.monotonic() > report_at:
                report_at += REPORT_SECONDS
                print(f"{until - time.monotonic():5.0f} s left; {crew.summary()}", flush=True)  # noqa: T201
        await asyncio.sleep(10)
    _check(fire, crew, watch.highest)
    rest = await settled(fire, OBJECTS, timeout=180)
    note("soak", crew, seed=seed, seconds=seconds, troubles=done.total(), at_rest_after=rest)
    print(  # noqa: T201
        f"seed {seed}: {dict(done)}\n{crew.summary()}\nmost bytes on the volume {watch.highest} of {LIMIT}"
        f" in {watch.samples} looks; at rest after {rest:.1f} s; all invariants hold"
    )


def _check(fire: FireWorld, crew: Crew, highest: int) -> None:
    crew.check()
    check_logs(fire)
    assert highest <= LIMIT, f"{highest} bytes on the volume, {LIMIT} allowed"


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
