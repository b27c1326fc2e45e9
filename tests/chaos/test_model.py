"""State store, queue and volume together, driven in random order by requests, workers that die anywhere, evictors that
stop, imports, purges and lost stores: no byte too many, no half object, no job lost, and everything comes to rest.

`MODEL_EXAMPLES` and `MODEL_SEED` change the number of examples and the first seed.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from distributor_node.shared.domain.objects import ObjectId
from tests.chaos.figures import record_result
from tests.chaos.model import Node
from tests.chaos.model_redis import ModelServer, RedisNode

BATCH = 50
"""Examples of one seed, so that a failure is found again within minutes."""


def run_model(machine: type[Node], examples: int, steps: int, first_seed: int) -> None:
    """Prints the seed of each batch."""
    began = time.monotonic()
    for number, start in enumerate(range(0, examples, BATCH)):
        chosen = first_seed + number
        sys.stdout.write(f"{machine.__name__}: seed {chosen}, {min(BATCH, examples - start)} examples\n")
        run_state_machine_as_test(
            seed(chosen)(type("Seeded", (machine,), {})),
            settings=settings(
                max_examples=min(BATCH, examples - start),
                stateful_step_count=steps,
                deadline=None,
                database=None,
                suppress_health_check=[HealthCheck.too_slow],
            ),
        )
    record_result(f"model_{machine.__name__}", seeds=number + 1, first_seed=first_seed, examples=examples,
                   seconds=time.monotonic() - began)  # fmt: skip


FIRST_SEED = int(os.environ.get("MODEL_SEED", str(time.time_ns() % 1_000_000_000)))
EXAMPLES = int(os.environ.get("MODEL_EXAMPLES", "1000"))


@pytest.mark.timeout(120)
def test_store_queue_and_volume_stay_consistent() -> None:
    run_model(Node, 8, 30, FIRST_SEED)


@pytest.mark.chaos
@pytest.mark.timeout(7200)
def test_store_queue_and_volume_stay_consistent_for_longer() -> None:
    run_model(Node, EXAMPLES, 60, FIRST_SEED)


@pytest.fixture
def redis_machine(tmp_path: Path) -> Iterator[type[RedisNode]]:
    if not ModelServer.is_installed():
        pytest.exit("these tests need redis-server on PATH: apt-get install redis-server", returncode=4)
    server = ModelServer(tmp_path)
    server.start()
    yield type("RedisNode", (RedisNode,), {"server": server})
    server.kill()


@pytest.mark.timeout(120)
def test_redis_queue_and_volume_stay_consistent(redis_machine: type[RedisNode]) -> None:
    run_model(redis_machine, 6, 30, FIRST_SEED)


@pytest.mark.chaos
@pytest.mark.timeout(7200)
def test_redis_queue_and_volume_stay_consistent_for_longer(redis_machine: type[RedisNode]) -> None:
    run_model(redis_machine, EXAMPLES, 60, FIRST_SEED)


@pytest.mark.timeout(120)
def test_a_redis_that_is_just_full_after_a_restart_takes_claims(redis_machine: type[RedisNode]) -> None:
    """Its scripts, which it gets with their first calls, count as its memory."""
    node = redis_machine()
    try:
        for _ in range(2):
            node.store_is_on_disk()
        node.lose_last_second(1)
        node.fill_store(1.0)

        async def work() -> None:
            for script in node.scripts.values():
                await node.client.script_load(script.text)

        node.runner.run(work())
        node.request(ObjectId("1"), False)
    finally:
        node.teardown()


@pytest.mark.timeout(120)
def test_a_purge_waits_for_a_lease_that_a_clock_put_back_has_prolonged(
    redis_machine: type[RedisNode],
) -> None:
    node = redis_machine()
    try:
        node.request(ObjectId("4"), False)
        node.work("die_before_commit", 0.0)
        node.purge_while_it_is_read(ObjectId("3"))
        node.work("wrong_bytes", 0.5)
        node.advance_clock(-3600.0)
    finally:
        node.teardown()
