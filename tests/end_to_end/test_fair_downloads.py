"""Downloads of a whole node with two API processes and two fetchers, on real Redis and RabbitMQ."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from itertools import pairwise
from pathlib import Path

import pytest

from distributor_node.services.demo.faults import Fault, Match
from distributor_node.services.demo.objects import generated_object
from distributor_node.services.demo.storage_node import StorageNode
from distributor_node.services.fetcher.scheduler import VIEWED_NOW
from tests.end_to_end.client import get
from tests.end_to_end.stack import Stack
from tests.waiting import eventually

pytestmark = pytest.mark.servers

FILMS = [str(number) for number in range(1, 10)]
IMAGES = [str(number) for number in range(100, 130)]
FILM, IMAGE = 2 * 1024 * 1024, 20_000
FILES = Match(endpoint="files", method="GET")
ONE_SLOT = {"DISTRIBUTOR_FETCH__CONCURRENCY": "1"}


@pytest.fixture
async def node() -> AsyncIterator[StorageNode]:
    objects = [generated_object(film, FILM) for film in FILMS]
    objects += [generated_object(image, IMAGE) for image in IMAGES]
    async with StorageNode(objects).run() as running:
        yield running


@pytest.fixture
async def stack(tmp_path: Path, redis_url: str, amqp_url: str, node: StorageNode) -> AsyncIterator[Stack]:
    async with AsyncExitStack() as resources:
        made = Stack(tmp_path, redis_url, amqp_url, f"fair-{uuid.uuid4().hex[:8]}")
        resources.callback(made.kill_all)
        made.write_manifest(node.objects.values(), [node.object_url("")])
        yield made


async def test_a_slow_first_source_keeps_no_object_out(stack: Stack, node: StorageNode) -> None:
    """At its rate an object takes minutes, and its slots would be full. The second source has them all."""
    node.faults.add(Fault(bytes_per_second=9_000), Match(endpoint="files", method="GET"))
    objects = [generated_object(film, FILM) for film in FILMS]
    async with StorageNode(objects).run() as second:
        # Nothing but its rate speaks against the first one, however busy the machine is.
        second.faults.add(Fault(latency_before_headers=1.5), Match(endpoint="version"))
        stack.write_manifest(objects, [node.object_url(""), second.object_url("")])
        await stack.up(fetchers=2, workers=2)
        asking = [asyncio.create_task(get(stack.url(film), timeout=90)) for film in FILMS]
        for film in FILMS:
            await stack.until_hit(film)
        assert [(answer.status, len(answer.body)) for answer in await asyncio.gather(*asking)] == [
            (200, FILM)
        ] * len(FILMS)
        # One that is outpaced is replaced at the same byte.
        for film in FILMS:
            assert len(node.requests.of(film, "GET")) <= 1 + len(second.requests.of(film, "GET"))
        assert sum(len(node.requests.of(film, "GET")) for film in FILMS) > 0


async def test_held_jobs_are_shared_between_fetchers_and_survive_their_kill(
    stack: Stack, node: StorageNode
) -> None:
    node.faults.add(Fault(bytes_per_second=200_000))
    stack.add("evictor")
    first = stack.add("fetcher", **ONE_SLOT)
    api = stack.add("api", DISTRIBUTOR_PUBLIC_API__WORKERS="2")
    await stack.ready()
    # The first fetcher takes all jobs, and runs one of them.
    for film in FILMS:
        assert (await get(stack.url(film), {"Range": "bytes=0-99"})).status == 206

    async def downloads() -> tuple[int, int, int]:
        status = await stack.status()
        return status["downloadsInProgress"], status["downloadsQueued"], status["workersAlive"]

    async def one_runs() -> bool:
        in_progress, queued, alive = await downloads()
        return (in_progress, alive) == (1, 1) and queued >= 1

    await eventually(one_runs)
    second = stack.add("fetcher", **ONE_SLOT)

    async def both_run() -> bool:
        in_progress, _, alive = await downloads()
        return (in_progress, alive) == (2, 2)

    await eventually(both_run, what="a held job goes to the second fetcher")
    for fetcher in (first, second):
        fetcher.kill()

    async def reported() -> bool:
        return "fetchers: none alive" in (await get(f"{api.health_url}/readyz")).json()["degraded"]

    await eventually(reported)
    # Whichever API process answers: every miss is proxied, and its job is kept.
    for image in IMAGES:
        answer = await get(stack.url(image))
        assert (answer.status, len(answer.body), answer.headers["x-data-source"]) == (200, IMAGE, "external")
    node.faults.clear()
    await stack.add("fetcher").healthy()
    for object_id in (*FILMS, *IMAGES):
        await stack.until_hit(object_id)


async def test_the_film_that_is_watched_is_fetched_before_those_that_were_left(
    stack: Stack, node: StorageNode
) -> None:
    node.faults.add(Fault(bytes_per_second=FILM // 8), FILES)
    stack.add("evictor")
    for _ in range(2):
        stack.add("fetcher", **ONE_SLOT)
    stack.add("api", DISTRIBUTOR_PUBLIC_API__WORKERS="2")
    await stack.ready()
    *left, watched = FILMS
    for film in left:
        assert (await get(stack.url(film), {"Range": "bytes=0-99"})).status == 206
    await asyncio.sleep(VIEWED_NOW)
    answer = await get(stack.url(watched))
    assert (answer.status, len(answer.body)) == (200, FILM)
    await stack.until_hit(watched)
    heads = [await get(stack.url(film), method="HEAD") for film in left]
    # Two were running when it came, and two more may have ended beside it.
    assert sum(head.headers["x-cache"] == "hit" for head in heads) <= 5


async def test_followers_go_on_when_every_fetcher_is_killed(stack: Stack, node: StorageNode) -> None:
    node.faults.add(Fault(bytes_per_second=FILM // 8), FILES)
    await stack.up(fetchers=2, workers=2)
    watching = [asyncio.create_task(get(stack.url(film))) for film in FILMS[:3] for _ in range(2)]
    await stack.until_on_volume(FILM)
    for fetcher in stack.of("fetcher"):
        fetcher.kill()
    for answer in await asyncio.gather(*watching):
        assert (answer.status, answer.complete, len(answer.body)) == (200, True, FILM)
        assert answer.headers["x-data-source"] == "local", "it began with what was fetched"
        arrivals = [arrived for arrived, _ in answer.pieces]
        assert max(later - earlier for earlier, later in pairwise(arrivals)) < 12, (
            "the lease is not waited for"
        )


async def test_a_range_far_ahead_of_a_slow_fetch_is_proxied_and_a_near_one_is_not(
    stack: Stack, node: StorageNode
) -> None:
    """In an hour the file would be there, and the range local."""
    node.faults.add(Fault(bytes_per_second=FILM // 16), FILES)
    stack.environment["DISTRIBUTOR_PUBLIC_API__FIRST_BYTE_WAIT"] = "3600"
    await stack.up(fetchers=2, workers=2)
    film, ahead = FILMS[0], FILM * 3 // 4
    watching = asyncio.create_task(get(stack.url(film)))
    await stack.until_on_volume(FILM // 8)
    for _ in range(6):  # of either API process
        near = await get(stack.url(film), {"Range": "bytes=1000-1999"})
        far = await get(stack.url(film), {"Range": f"bytes={ahead}-{ahead + 999}"})
        assert [answer.status for answer in (near, far)] == [206, 206]
        assert [answer.headers["x-data-source"] for answer in (near, far)] == ["local", "external"]
    assert (await get(stack.url(film), method="HEAD")).headers["x-cache"] == "pending"
    assert (await watching).complete


async def test_a_proxied_success_ends_the_failure_of_the_only_source(stack: Stack, node: StorageNode) -> None:
    """The failure is remembered for a minute or more, and the job has a delay of seconds."""
    node.faults.add(Fault(status=503), FILES)
    await stack.up(fetchers=2, workers=2)
    image = IMAGES[0]

    assert (await get(stack.url(image))).status >= 500
    await eventually(lambda: "job_ended" in stack.logs(), what="its fetch fails")
    node.faults.clear()
    proxied = 0

    async def is_hit() -> bool:
        nonlocal proxied
        answer = await get(stack.url(image))
        assert answer.status == 200
        proxied += answer.headers["x-data-source"] == "external"
        return answer.headers["x-cache"] == "hit"

    await eventually(is_hit, pause=0.25)
    assert proxied <= 4


async def test_wrong_bytes_of_the_only_source_are_asked_for_again_after_a_backoff(
    stack: Stack, node: StorageNode
) -> None:
    """Not at once, not by each request, and not after ten minutes: 5 s, 10 s, and so on, for all processes."""
    image = IMAGES[0]
    node.faults.add(Fault(flip_byte_at=100), FILES)
    await stack.up(fetchers=2, workers=2)
    refused = 0

    async def asked_again() -> bool:
        """Several times, and not only by the first requests to each process."""
        nonlocal refused
        answer = await get(stack.url(image))
        assert answer.status >= 500 or not answer.complete
        refused += 1
        asked = [record.started_at for record in node.requests.of(image, "GET")]
        return refused >= 40 and asked[-1] - asked[0] > 7

    await eventually(asked_again, pause=0.25)
    assert len(node.requests.of(image, "GET")) <= refused / 2
    node.faults.clear()

    async def is_hit() -> bool:
        return (await get(stack.url(image))).headers.get("x-cache") == "hit"

    await eventually(is_hit, pause=0.25)
