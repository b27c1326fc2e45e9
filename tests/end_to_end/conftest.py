"""A whole node for each test: own volume, own key prefix, own queues; two storage nodes to fetch from."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from redis import asyncio as aioredis

from distributor_node.services.demo.objects import DemoObject
from distributor_node.services.demo.storage_node import StorageNode
from tests.end_to_end.stack import Stack


@dataclass(slots=True)
class Harness:
    """The node and the storage nodes it fetches from; `first` comes first in the catalog."""

    stack: Stack
    first: StorageNode
    second: StorageNode

    async def empty_state_store(self) -> None:
        """What belongs to this node is gone from Redis, as after a loss of its disk."""
        environment = self.stack.environment
        client = aioredis.Redis.from_url(environment["DISTRIBUTOR_STATE_STORE__URL"], protocol=2)
        prefix = environment["DISTRIBUTOR_STATE_STORE__PREFIX"]
        keys = [key async for key in client.scan_iter(f"{prefix}*")]
        await client.delete(*keys)
        await client.aclose()

    def publish(self, objects: Sequence[DemoObject], *, both: bool = False) -> None:
        """Put objects on the first storage node (or on both) and in the catalog."""
        nodes = (self.first, self.second) if both else (self.first,)
        for node in nodes:
            node.objects.update({item.object_id: item for item in objects})
        self.stack.write_manifest(objects, [f"{node.api_url}/files/" for node in nodes])


@pytest.fixture
async def harness(tmp_path: Path, redis_url: str, amqp_url: str) -> AsyncIterator[Harness]:
    async with running(Stack(tmp_path, redis_url, amqp_url, f"e2e-{uuid.uuid4().hex[:8]}")) as made:
        yield made


@pytest.fixture
async def alone(tmp_path: Path) -> AsyncIterator[Harness]:
    """A stack without Redis and RabbitMQ. Tests add the one process themselves."""
    async with running(Stack(tmp_path, "memory://", "memory://", "alone")) as made:
        yield made


@asynccontextmanager
async def running(stack: Stack) -> AsyncIterator[Harness]:
    """Two storage nodes for the stack. At the end all its processes are killed."""
    async with StorageNode([]).run() as first, StorageNode([]).run() as second:
        try:
            yield Harness(stack, first, second)
        finally:
            stack.kill_all()
