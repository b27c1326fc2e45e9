"""Our node as real processes on one volume, one Redis and one RabbitMQ."""

from __future__ import annotations

import asyncio
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from benchmarks.dataset import file_on_volume
from benchmarks.processes import OwnProcess
from distributor_node.shared.adapters.state_common import StateTimeouts
from distributor_node.shared.adapters.state_redis import RedisStateStore
from distributor_node.shared.domain.objects import ObjectId
from tests.servers.rabbitmq_server import RabbitServer
from tests.servers.redis_server import free_port

_READY_SECONDS = 60.0
_PURGE_SECONDS = 60.0
_KEY_PREFIX = "DISTRIBUTOR_STATE_STORE__PREFIX"


class Node:
    """Starts services on demand; all of them are stopped by `close`."""

    def __init__(self, folder: Path, manifest: Path, **settings: str) -> None:
        self.folder = folder
        self.volume = folder / "volume"
        self.redis_port = free_port()
        self._resources = ExitStack()
        self._names: dict[str, int] = {}
        self._environment = {
            "DISTRIBUTOR_STATE_STORE__URL": f"redis://127.0.0.1:{self.redis_port}/0",
            "DISTRIBUTOR_CATALOG__MANIFEST": str(manifest),
            "DISTRIBUTOR_STORAGE__PATH": str(self.volume),
            "DISTRIBUTOR_STORAGE__LIMIT": "60G",
            "DISTRIBUTOR_PUBLIC_API__HOST": "127.0.0.1",
            "DISTRIBUTOR_METRICS__HOST": "127.0.0.1",
            "DISTRIBUTOR_EVICTOR__SCRUB_RATE": "0",
            _KEY_PREFIX: "distributor:",
            **settings,
        }

    @property
    def redis_url(self) -> str:
        return self._environment["DISTRIBUTOR_STATE_STORE__URL"]

    def start_servers(self) -> None:
        """Redis (as shipped: append-only, synced each second) and RabbitMQ."""
        place = self.folder / "redis"
        place.mkdir()
        redis = ["redis-server", "--port", str(self.redis_port), "--bind", "127.0.0.1", "--dir", str(place)]
        redis += ["--save", "", "--appendonly", "yes", "--appendfsync", "everysec"]
        self._run(OwnProcess("redis", redis, self.folder)).wait_listening(self.redis_port)
        place = self.folder / "rabbitmq"
        place.mkdir()
        rabbitmq = self._resources.enter_context(RabbitServer(place))
        self._environment["DISTRIBUTOR_JOB_QUEUE__URL"] = rabbitmq.url

    def beside(self, folder: Path, name: str = "beside", **settings: str) -> Node:
        """Another node in a folder of its own, on the same servers. `name`: of its keys and queues."""
        settings = {
            **self._environment,
            "DISTRIBUTOR_STORAGE__PATH": str(folder / "volume"),
            _KEY_PREFIX: f"{name}:",
            "DISTRIBUTOR_JOB_QUEUE__PREFIX": f"{name}.",
            **settings,
        }
        return Node(folder, Path(self._environment["DISTRIBUTOR_CATALOG__MANIFEST"]), **settings)

    def start(self, kind: str, **settings: str) -> RunningService:
        """`api`, `fetcher` or `evictor`, with settings of its own; returns when it is ready."""
        service = self.launch(kind, **settings)
        service.wait_ready()
        return service

    def launch(self, kind: str, **settings: str) -> RunningService:
        """As `start`, without waiting."""
        number = self._names[kind] = self._names.get(kind, 0) + 1
        port, metrics_port = free_port(), free_port()
        environment = {
            **self._environment,
            "DISTRIBUTOR_PUBLIC_API__PORT": str(port),
            "DISTRIBUTOR_METRICS__PORT": str(metrics_port),
            **settings,
        }
        command = [sys.executable, "-m", "distributor_node.services.command_line", kind]
        process = OwnProcess(f"{kind}-{number}", command, self.folder, environment)
        return RunningService(self._run(process), port, metrics_port)

    def purge(self, object_ids: Sequence[str]) -> None:
        """Have the evictor remove these; returns when their files are gone. RuntimeError if that takes too long."""
        asyncio.run(self._want_purges([ObjectId.parse(object_id) for object_id in object_ids]))
        deadline = time.monotonic() + _PURGE_SECONDS
        while any(file_on_volume(self.volume, object_id).exists() for object_id in object_ids):
            if time.monotonic() > deadline:
                raise RuntimeError(f"{', '.join(object_ids)} not purged in time")
            time.sleep(0.01)

    async def _want_purges(self, object_ids: Sequence[ObjectId]) -> None:
        state = RedisStateStore(self.redis_url, self._environment[_KEY_PREFIX], 1, StateTimeouts())
        await state.open()
        try:
            await state.request_purges(object_ids)
        finally:
            await state.close()

    def _run(self, process: OwnProcess) -> OwnProcess:
        self._resources.callback(process.stop)
        return process.start()

    def close(self) -> None:
        self._resources.close()


class RunningService:
    """One service, its public port (of an API) and the port on which it answers /readyz."""

    def __init__(self, process: OwnProcess, port: int, metrics_port: int) -> None:
        self.process = process
        self.port = port
        self.metrics_port = metrics_port

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def assets_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/api/v1/assets/"

    @property
    def status_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/api/v1/status"

    def wait_ready(self, seconds: float = _READY_SECONDS) -> None:
        deadline = time.monotonic() + seconds
        while not self.is_ready():
            self.process.check(deadline)
            time.sleep(0.02)

    def is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/readyz", timeout=2) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def stop(self) -> None:
        self.process.stop()
