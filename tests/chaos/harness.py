"""A whole node with a TCP relay in front of Redis, RabbitMQ and each of two storage nodes."""

from __future__ import annotations

import asyncio
import os
import signal
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from distributor_node.services.demo.objects import DemoObject, generated_object
from distributor_node.services.demo.storage_node import StorageNode
from distributor_node.shared.adapters.state_common import StateTimeouts
from distributor_node.shared.adapters.state_redis import RedisStateStore
from tests.chaos.clients import ClientPool
from tests.chaos.watchers import VolumeMonitor, process_tree
from tests.end_to_end.stack import ServiceProcess, Stack
from tests.servers.rabbitmq_server import RabbitServer
from tests.servers.redis_server import RedisServer
from tests.servers.tcp_relay import TcpRelay
from tests.waiting import eventually

SETTINGS = {
    "DISTRIBUTOR_FETCH__LEASE": "3",
    "DISTRIBUTOR_FETCH__LEASE_RENEWAL": "1",
    "DISTRIBUTOR_FETCH__STALL_TIMEOUT": "2",
    "DISTRIBUTOR_FETCH__FIRST_BYTE_TIMEOUT": "2",
    "DISTRIBUTOR_FETCH__FAILURE_MEMORY": "2",
    "DISTRIBUTOR_FETCH__SPACE_WAIT": "3",
    "DISTRIBUTOR_JOB_QUEUE__RETRY_DELAYS": "[0.5, 1, 2, 4]",
    "DISTRIBUTOR_EVICTOR__MIN_IDLE": "1",
    "DISTRIBUTOR_EVICTOR__PARTIAL_KEEP": "12",
    "DISTRIBUTOR_EVICTOR__LEADERSHIP": "3",
    "DISTRIBUTOR_EVICTOR__LEADERSHIP_RENEWAL": "1",
    "DISTRIBUTOR_EVICTOR__SCRUB_RATE": "0",
    "DISTRIBUTOR_SHUTDOWN_DEADLINE": "20",
}
"""Short times, so that what a fault costs shows within seconds."""
KIB = 1024


def mixed_objects(count: int, seed: int = 0) -> list[DemoObject]:
    """Objects of 1 KiB to 2 MiB."""
    sizes = (1, 40, 70, 200, 600, 1100, 2048)
    return [
        generated_object(str(1000 * seed + number + 1), sizes[number % len(sizes)] * KIB + number)
        for number in range(count)
    ]


@dataclass(slots=True)
class ChaosHarness:
    """`objects` are published on both storage nodes."""

    stack: Stack
    first: StorageNode
    second: StorageNode
    redis: RedisServer
    rabbit: RabbitServer
    to_redis: TcpRelay
    to_rabbit: TcpRelay
    to_first: TcpRelay
    to_second: TcpRelay
    prefix: str
    limit: int = 0

    def publish(self, objects: Sequence[DemoObject], *, second: bool = True) -> None:
        nodes = [(self.first, self.to_first), (self.second, self.to_second)][: 2 if second else 1]
        for node, _ in nodes:
            node.objects.update({item.object_id: item for item in objects})
        bases = [f"http://127.0.0.1:{relay.port}/api/v1/files/" for _, relay in nodes]
        self.stack.write_manifest(objects, bases)

    async def up(
        self, objects: Sequence[DemoObject], limit: int, *, fetchers: int = 1, workers: int = 1
    ) -> ClientPool:
        """Publish, start one of each, and hand out a pool of clients for them."""
        self.limit = limit
        self.stack.environment["DISTRIBUTOR_STORAGE__LIMIT"] = str(limit)
        self.publish(objects)
        await self.stack.up(fetchers=fetchers, workers=workers)
        await self.until_reconciled()
        return ClientPool(self.stack.url, objects)

    def only(self, kind: str) -> ServiceProcess:
        (found,) = self.stack.of(kind)
        return found

    def monitor_volume(self) -> VolumeMonitor:
        """Of the volume, with all processes that run now."""
        running = [process.process.pid for process in self.stack.processes if process.process]
        return VolumeMonitor(self.stack.volume, [pid for parent in running for pid in process_tree(parent)])

    @asynccontextmanager
    async def state(self) -> AsyncIterator[RedisStateStore]:
        """The state store, past the relay."""
        store = RedisStateStore(self.redis.url, f"{self.prefix}:", self.limit, StateTimeouts(lease_seconds=3))
        await store.open()
        try:
            yield store
        finally:
            await store.close()

    async def until_reconciled(self, timeout: float = 60.0) -> float:
        """Seconds until the index stood for the volume."""
        began = time.monotonic()
        async with self.state() as state:

            async def reconciled() -> bool:
                return (await state.usage()).reconciled

            await eventually(reconciled, timeout, pause=0.02)
        return time.monotonic() - began

    async def queue_lengths(self) -> dict[str, int]:
        """Messages by queue, ours only, dead letters left out."""
        listed = await asyncio.to_thread(self.rabbit.list_queues)
        return {
            name: count
            for name, count in listed.items()
            if name.startswith(self.prefix) and "dead" not in name
        }


@contextmanager
def frozen(process: ServiceProcess) -> Iterator[None]:
    """The process stands still, with all its threads."""
    assert process.process is not None
    os.kill(process.process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(process.process.pid, signal.SIGCONT)


@asynccontextmanager
async def chaos_harness(
    folder: Path, redis: RedisServer, rabbit: RabbitServer
) -> AsyncIterator[ChaosHarness]:
    """Nothing runs yet but the servers and the storage nodes."""
    async with AsyncExitStack() as opened:
        enter = opened.enter_async_context
        first, second = await enter(StorageNode([]).run()), await enter(StorageNode([]).run())
        to_redis, to_rabbit, to_first, to_second = [
            await enter(TcpRelay(port).running())
            for port in (redis.port, rabbit.port, first.port, second.port)
        ]
        prefix = f"chaos-{uuid.uuid4().hex[:8]}"
        stack = Stack(
            folder,
            f"redis://127.0.0.1:{to_redis.port}/0",
            f"amqp://guest:guest@127.0.0.1:{to_rabbit.port}/",
            prefix,
        )
        stack.environment |= SETTINGS
        stack.executed = True
        opened.callback(stack.kill_all)
        yield ChaosHarness(
            stack, first, second, redis, rabbit, to_redis, to_rabbit, to_first, to_second, prefix
        )
