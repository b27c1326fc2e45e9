"""The edge's configuration in a real nginx of this machine, in front of a scripted API."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.docker.compose import free_ports

ROOT = Path(__file__).parents[2]
EDGE = ROOT / "deploy" / "edge"
START = EDGE / "start.sh"
DEFAULTS = {
    "EDGE_PREFIX": "",
    "EDGE_OBJECTS_PREFIX": "/_objects",
    "EDGE_SENDFILE_TYPE": "",
    "EDGE_CONNECTIONS_PER_ADDRESS": "64",
}
needs_nginx = pytest.mark.skipif(
    shutil.which("nginx") is None or shutil.which("envsubst") is None,
    reason="no nginx or no envsubst here (Debian: nginx-light, gettext-base)",
)


def render(folder: Path, settings: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run start.sh up to nginx: its configuration goes to `folder`/conf.d, certificates are in `folder`/tls."""
    for name in ("conf.d", "tls"):
        (folder / name).mkdir(exist_ok=True)
    environment = {
        "PATH": os.environ["PATH"],
        "EDGE_TEMPLATE_DIRECTORY": str(EDGE),
        "EDGE_TLS_FILES": str(folder / "tls"),
        **DEFAULTS,
        **settings,
    }
    return subprocess.run(
        ["sh", START, "--render", folder / "conf.d"],
        env=environment, check=False, capture_output=True, text=True, timeout=30,
    )  # fmt: skip


def make_certificate(folder: Path) -> None:
    """certificate.pem and key.pem in `folder`/tls, signed by themselves."""
    target = folder / "tls"
    target.mkdir(exist_ok=True)
    subprocess.run(
        [
            "openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1",
            "-keyout", "key.pem", "-out", "certificate.pem",
        ],
        cwd=target, check=True, capture_output=True,
    )  # fmt: skip


@dataclass(slots=True)
class ScriptedApi:
    """Answers connection by connection as `script` says, and with 200 when it is used up: a status to answer with, or
    `close`: read the request and end the connection without an answer."""

    port: int
    script: list[int | str] = field(default_factory=list)
    heads: list[str] = field(default_factory=list)
    """Of the requests that came, in order."""
    body: bytes = b"an object"
    go_on: asyncio.Event | None = None
    """If set, the second half of a body waits for it."""
    half_sent: asyncio.Event = field(default_factory=asyncio.Event)
    _server: asyncio.Server | None = None

    async def listen(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer), contextlib.suppress(ConnectionError):
            self.heads.append((await reader.readuntil(b"\r\n\r\n")).decode())
            step = self.script.pop(0) if self.script else 200
            if step == "close":
                return
            head = (
                f"HTTP/1.1 {step} Scripted\r\nContent-Length: {len(self.body)}\r\nConnection: close\r\n\r\n"
            )
            half = len(self.body) // 2
            writer.write(head.encode() + self.body[:half])
            await writer.drain()
            self.half_sent.set()
            if self.go_on is not None:
                await self.go_on.wait()
            writer.write(self.body[half:])
            await writer.drain()


@dataclass(slots=True)
class Edge:
    port: int
    tls_port: int
    process: asyncio.subprocess.Process
    api: ScriptedApi
    folder: Path

    def reload(self) -> None:
        self.process.send_signal(signal.SIGHUP)


@contextlib.asynccontextmanager
async def edge(folder: Path, *, listening: bool = True, **settings: str) -> AsyncIterator[Edge]:
    """nginx with the edge's configuration, all addresses and paths replaced by ones of this test."""
    port, tls_port, health_port, api_port = free_ports(4)
    rendered = await asyncio.to_thread(render, folder, {"EDGE_TLS_PORT": str(tls_port), **settings})
    assert rendered.returncode == 0, rendered.stderr
    (folder / "acme").mkdir(exist_ok=True)
    path = folder / "conf.d" / "distributor.conf"
    replaced = path.read_text()
    for old, new in (
        ("listen 8080", f"listen 127.0.0.1:{port}"),
        ("[::]:8080", f"[::1]:{port}"),
        ("listen 8443", f"listen 127.0.0.1:{tls_port}"),
        ("[::]:8443", f"[::1]:{tls_port}"),
        ("127.0.0.1:8081", f"127.0.0.1:{health_port}"),
        ("/tmp/attempt.sock", str(folder / "s")),
        ("set $api api;", "set $api 127.0.0.1;"),
        ("$api:3334", f"$api:{api_port}"),
        ("/var/lib/acme", str(folder / "acme")),
    ):
        absent = ("8443" in old and not (folder / "tls" / "key.pem").exists()) or (
            old == "$api:3334" and "EDGE_UPSTREAMS" in settings
        )
        assert old in replaced or absent, old
        replaced = replaced.replace(old, new)
    path.write_text(replaced)
    main = (
        (EDGE / "nginx.conf")
        .read_text()
        .replace("/tmp/", f"{folder}/")
        .replace("/etc/nginx/conf.d", str(folder / "conf.d"))
    )
    (folder / "nginx.conf").write_text(main)
    directives = "daemon off; worker_processes 2;" + (" user root;" if os.geteuid() == 0 else "")
    api = ScriptedApi(api_port)
    if listening:
        await api.listen()
    with (folder / "log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            "nginx", "-c", folder / "nginx.conf", "-e", "stderr", "-g", directives, stderr=log
        )
    try:
        await _until_connected(port, folder / "log", process)
        yield Edge(port, tls_port, process, api, folder)
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()
        await api.close()


async def _until_connected(port: int, log: Path, process: asyncio.subprocess.Process) -> None:
    async with asyncio.timeout(20):
        while True:
            assert process.returncode is None, log.read_text()
            with contextlib.suppress(OSError):
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.close()
                return
            await asyncio.sleep(0.05)
