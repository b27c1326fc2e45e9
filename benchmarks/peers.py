"""The contenders: each serves the same objects below `url`, as separate processes."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from benchmarks.accounting import pin
from benchmarks.dataset import Group, file_on_volume
from benchmarks.nginx import Nginx
from benchmarks.node import Node, RunningService
from benchmarks.origin import Origin
from benchmarks.processes import OwnProcess
from tests.servers.redis_server import free_port

OURS, CACHE, STATIC, VARNISH = "ours", "nginx proxy_cache", "nginx static", "varnish"
AGING = f"{OURS}, HTTP origin"
TRACED = f"{OURS}, traced"
WATCHED, UNWATCHED = f"{OURS}, 20 pages open", f"{OURS}, without its page"
PAGES = 20
_PAGES_SETTLE = 3.0  # seconds until all processes report each second


class Peer(Protocol):
    """A contender. `start` returns when it answers; `stop` leaves nothing running."""

    name: str

    @property
    def url(self) -> str:
        """What the id of an object is appended to."""

    @property
    def pids(self) -> Sequence[int]:
        """The processes (with their descendants) whose CPU time a request costs."""

    def files(self, groups: Iterable[Group]) -> list[Path]:
        """The files that hold these objects, to be dropped from memory."""

    def start(self) -> None: ...

    def stop(self) -> None: ...


class Ours:
    """An API process of our node; fetcher, evictor, Redis and RabbitMQ run beside it."""

    def __init__(self, node: Node, workers: int = 1, name: str = OURS) -> None:
        self.name = name
        self._node = node
        self._workers = workers
        self._service: RunningService | None = None

    @property
    def url(self) -> str:
        return self._running().assets_url

    @property
    def pids(self) -> Sequence[int]:
        return [self._running().pid]

    def files(self, groups: Iterable[Group]) -> list[Path]:
        return [file_on_volume(self._node.volume, object_id) for group in groups for object_id in group.ids]

    def start(self) -> None:
        self._service = self._node.start("api", DISTRIBUTOR_PUBLIC_API__WORKERS=str(self._workers))

    def stop(self) -> None:
        if self._service is not None:
            self._service.stop()
            self._service = None

    def _running(self) -> RunningService:
        if self._service is None:
            raise RuntimeError(f"{self.name} is not running")
        return self._service


class Watched(Ours):
    """Ours with PAGES pages of the node open while it is measured, or (`pages` 0) with its page turned off."""

    def __init__(self, node: Node, name: str, pages: int) -> None:
        super().__init__(node, 1, name)
        self._pages, self._port = pages, free_port()

    def start(self) -> None:
        self._service = self._node.start(
            "api",
            DISTRIBUTOR_DASHBOARD__ENABLED=str(self._pages > 0),
            DISTRIBUTOR_DASHBOARD__PORT=str(self._port),
        )

    @contextmanager
    def measured(self, cpus: frozenset[int] | None) -> Iterator[None]:
        """Open the pages on the CPUs of the load for the time of the block."""
        if not self._pages:
            yield
            return
        urls = [f"http://127.0.0.1:{self._port}/events"] * self._pages
        command = [
            "curl",
            "--silent",
            "--no-buffer",
            "--parallel",
            "--parallel-immediate",
            "--parallel-max",
            "100",
        ]
        process = subprocess.Popen([*command, *urls], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            pin([process.pid], cpus)
            time.sleep(_PAGES_SETTLE)
            yield
            if process.poll() is not None:
                raise RuntimeError(f"the pages were closed: curl ended with {process.returncode}")
        finally:
            process.kill()
            process.wait()


class NginxCache:
    """nginx `proxy_cache` in front of the source; its cache is filled by asking for everything once."""

    def __init__(self, folder: Path, origin: Origin, workers: int = 1, name: str = CACHE) -> None:
        self.name = name
        self._nginx = Nginx(name.replace(" ", "-"), folder, workers)
        self._origin = origin

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._nginx.port}/api/v1/assets/"

    @property
    def pids(self) -> Sequence[int]:
        return [self._nginx.process.pid]

    def files(self, groups: Iterable[Group]) -> list[Path]:
        """All of its cache: its names say nothing of the objects."""
        return [path for path in (self._nginx.folder / "cache").rglob("*") if path.is_file()]

    def start(self) -> None:
        self._nginx.start_cache(self._origin.port)

    def stop(self) -> None:
        self._nginx.stop()


class NginxStatic:
    """nginx serving a directory that has a hard link for each file of our volume: the very same pages in memory."""

    def __init__(self, folder: Path, volume: Path, groups: Sequence[Group], name: str = STATIC) -> None:
        self.name = name
        self._nginx = Nginx(name.replace(" ", "-"), folder)
        self._volume = volume
        self._groups = groups

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._nginx.port}/api/v1/assets/"

    @property
    def pids(self) -> Sequence[int]:
        return [self._nginx.process.pid]

    def files(self, groups: Iterable[Group]) -> list[Path]:
        return [file_on_volume(self._volume, object_id) for group in groups for object_id in group.ids]

    def start(self) -> None:
        root = self._nginx.folder / "root"
        root.mkdir()
        for group in self._groups:
            for object_id in group.ids:
                os.link(file_on_volume(self._volume, object_id), root / object_id)
        self._nginx.start_static(root)

    def stop(self) -> None:
        self._nginx.stop()


_VCL = """
vcl 4.1;
backend source {{ .host = "127.0.0.1"; .port = "{port}"; }}
sub vcl_recv {{ set req.url = regsub(req.url, "^/api/v1/assets/", "/api/v1/files/"); }}
sub vcl_backend_response {{ set beresp.ttl = 30d; }}
"""


class Varnish:
    """varnish with its cache in memory (its usual storage), large enough for every object."""

    def __init__(self, folder: Path, origin: Origin) -> None:
        self.name = VARNISH
        self._port = free_port()
        self._origin = origin
        self._folder = folder / "varnish"
        self._folder.mkdir()
        self._rules = self._folder / "rules.vcl"
        # No jail: for root's varnish it would be another user, who may not look into this run's folder.
        command = [varnish_program() or "varnishd", "-j", "none", "-F", "-n", str(self._folder / "work")]
        command += ["-a", f"127.0.0.1:{self._port}", "-f", str(self._rules), "-s", "malloc,3G"]
        self._process = OwnProcess("varnish", [*command, "-p", "listen_depth=4096"], folder)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}/api/v1/assets/"

    @property
    def pids(self) -> Sequence[int]:
        return [self._process.pid]

    def files(self, groups: Iterable[Group]) -> list[Path]:
        """None: it keeps objects in memory."""
        return []

    def start(self) -> None:
        self._rules.write_text(_VCL.format(port=self._origin.port))
        self._process.start().wait_listening(self._port)

    def stop(self) -> None:
        self._process.stop()


def varnish_program() -> str | None:
    return shutil.which("varnishd") or shutil.which("varnishd", path="/usr/sbin:/usr/local/sbin")
