"""A whole node as real processes on real servers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distributor_node.services.demo.manifest import content_hash
from distributor_node.services.demo.objects import DemoObject
from tests.end_to_end.client import Answer, get
from tests.preloaded import PreloadedProcess
from tests.servers.redis_server import free_port
from tests.waiting import eventually

START_SECONDS = 90.0


_UNKNOWN_TO_FORMER = ("DISTRIBUTOR_DASHBOARD__PORT",)
"""Settings that releases before this one refuse."""


@dataclass(slots=True)
class ServiceProcess:
    """One `distributor …` process; its log is in `log`.

    It is forked from one that has imported the libraries, unless it is of another version or `executed`.
    """

    name: str
    arguments: Sequence[str]
    environment: Mapping[str, str]
    log: Path
    health_url: str
    release: Path | None = None  # the code of another version; None: this one
    executed: bool = False  # by `python -m`, for tests that measure a process
    process: subprocess.Popen[bytes] | PreloadedProcess | None = field(default=None)
    was_killed: bool = False  # at any time

    def start(self) -> None:
        environment = {**os.environ, **self.environment}
        several = environment.get("DISTRIBUTOR_PUBLIC_API__WORKERS", "1") != "1"
        if self.release is None and not self.executed and not several:
            self.process = PreloadedProcess(self.arguments, environment, self.log)
            return
        if self.release is not None:
            environment["PYTHONPATH"] = str(self.release)
            for name in _UNKNOWN_TO_FORMER:
                environment.pop(name, None)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "distributor_node.services.command_line", *self.arguments],
                env=environment,
                cwd=self.release,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    async def healthy(self) -> None:
        """Return when /readyz answers 200."""
        deadline = time.monotonic() + START_SECONDS
        while True:
            assert self.process is not None
            if self.process.poll() is not None:
                raise AssertionError(f"{self.name} ended: {self.tail()}")
            try:
                if (await get(f"{self.health_url}/readyz", timeout=10)).status == 200:
                    return
            except (OSError, TimeoutError):
                pass
            if time.monotonic() > deadline:
                raise AssertionError(f"{self.name} is not ready: {self.tail()}")
            await asyncio.sleep(0.05)

    def send(self, number: signal.Signals) -> None:
        """To the process alone."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)

    def kill(self) -> None:
        """`kill -9`, its children too."""
        if self.process is not None:
            self.was_killed = True
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.kill()  # it may have been forked a moment ago, and not have its own group yet
            self.process.wait(10)

    async def stop(self, timeout: float = 90.0) -> int:
        """SIGTERM; the exit code."""
        assert self.process is not None
        self.send(signal.SIGTERM)
        return await asyncio.to_thread(self.process.wait, timeout)

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-4000:]


class Stack:
    """API, fetchers and evictor around one volume, one Redis, one RabbitMQ and one manifest."""

    def __init__(self, folder: Path, redis_url: str, amqp_url: str, prefix: str) -> None:
        self.folder = folder
        self.volume = folder / "volume"
        self.manifest = folder / "manifest.json"
        self.config: Path | None = None
        self.release: Path | None = None  # of the processes that are started from now on; None: this one
        self.executed = False  # likewise: whether each imports everything by itself
        self.port = free_port()
        self.processes: list[ServiceProcess] = []
        self.environment: dict[str, str] = {
            "DISTRIBUTOR_STATE_STORE__URL": redis_url,
            "DISTRIBUTOR_STATE_STORE__PREFIX": prefix + ":",
            "DISTRIBUTOR_JOB_QUEUE__URL": amqp_url,
            "DISTRIBUTOR_JOB_QUEUE__PREFIX": prefix,
            "DISTRIBUTOR_CATALOG__MANIFEST": str(self.manifest),
            "DISTRIBUTOR_STORAGE__PATH": str(self.volume),
            "DISTRIBUTOR_STORAGE__LIMIT": "1G",
            # Tests of a full cache expect that every first view is fetched; releases before `off` read this too
            "DISTRIBUTOR_ADMISSION__ABOVE_SIZE": "1P",
            "DISTRIBUTOR_PUBLIC_API__HOST": "127.0.0.1",
            "DISTRIBUTOR_PUBLIC_API__PORT": str(self.port),
            "DISTRIBUTOR_METRICS__HOST": "127.0.0.1",
            "DISTRIBUTOR_DASHBOARD__PORT": "0",
        }

    def url(self, object_id: str) -> str:
        return f"http://127.0.0.1:{self.port}/api/v1/assets/{object_id}"

    def write_manifest(self, objects: Iterable[DemoObject], sources: Sequence[str]) -> None:
        """`sources` are the base URLs of storage nodes, up to and including `/files/`."""
        write_manifest(self.manifest, objects, sources)

    def add(self, kind: str, **settings: str) -> ServiceProcess:
        """Start one more process: `api`, `fetcher`, `evictor` or `standalone`."""
        metrics_port = free_port()
        name = f"{kind}-{len(self.processes)}"
        process = ServiceProcess(
            name=name,
            arguments=[kind, *(["--config", str(self.config)] if self.config else [])],
            environment={**self.environment, "DISTRIBUTOR_METRICS__PORT": str(metrics_port), **settings},
            log=self.folder / f"{name}.log",
            health_url=f"http://127.0.0.1:{metrics_port}",
            release=self.release,
            executed=self.executed,
        )
        process.start()
        self.processes.append(process)
        return process

    async def up(self, *, fetchers: int = 1, workers: int = 1) -> None:
        """Start one of each, and wait until all are ready."""
        self.add("evictor")
        for _ in range(fetchers):
            self.add("fetcher")
        self.add("api", DISTRIBUTOR_PUBLIC_API__WORKERS=str(workers))
        await self.ready()

    async def ready(self) -> None:
        await asyncio.gather(*(process.healthy() for process in self.running()))

    def running(self) -> list[ServiceProcess]:
        """Those that were started, and neither stopped nor killed."""
        return [
            process for process in self.processes if process.process and process.process.returncode is None
        ]

    def of(self, kind: str) -> list[ServiceProcess]:
        return [process for process in self.processes if process.name.startswith(kind)]

    def kill_all(self) -> None:
        for process in self.processes:
            process.kill()

    async def status(self) -> Any:
        return (await get(f"http://127.0.0.1:{self.port}/api/v1/status")).json()

    async def until_hit(self, object_id: str, timeout: float = 90.0) -> Answer:
        """Ask by HEAD until the object is cached."""
        deadline = time.monotonic() + timeout
        while True:
            answer = await get(self.url(object_id), method="HEAD")
            if answer.headers.get("x-cache") == "hit":
                return answer
            assert time.monotonic() < deadline, f"{object_id} is not cached: {answer}"
            await asyncio.sleep(0.05)

    def bytes_on_volume(self) -> int:
        """The sum of all file sizes below the volume, whatever they are."""
        total = 0
        for folder, _, names in os.walk(self.volume):
            for name in names:
                try:
                    total += Path(folder, name).lstat().st_size
                except FileNotFoundError:
                    continue
        return total

    async def until_on_volume(self, size: int, timeout: float = 90.0) -> None:
        """Return when the volume holds at least `size` bytes."""
        await eventually(lambda: self.bytes_on_volume() >= size, timeout, pause=0.02)

    def logs(self) -> str:
        return "\n".join(
            f"== {process.name}\n{process.log.read_text(errors='replace')}" for process in self.processes
        )


def write_manifest(path: Path, objects: Iterable[DemoObject], sources: Sequence[str]) -> None:
    """A manifest of these objects, each held by all sources, in this order."""
    entries = [
        {
            "id": item.object_id,
            "size": item.size,
            "hash": content_hash(item.content),
            "media_type": item.media_type,
            "bucket": item.bucket,
            "accepted": item.held,
        }
        for item in objects
    ]
    draft = path.with_suffix(".new")
    draft.write_text(json.dumps({"version": 1, "base_urls": list(sources), "objects": entries}))
    draft.replace(path)
