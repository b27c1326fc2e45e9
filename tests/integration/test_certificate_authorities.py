"""Servers whose certificates a private authority has signed: refused by default, trusted as docs/deployment.md says."""

from __future__ import annotations

import asyncio
import ssl
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from distributor_node.shared.adapters.catalogs.joystream import JoystreamCatalog, SquidLimits
from distributor_node.shared.adapters.queue_rabbitmq.connection import BROKER_ERRORS, open_session
from distributor_node.shared.adapters.sources.client import Expected, SourceClient
from distributor_node.shared.adapters.sources.connections import SourceLimits
from distributor_node.shared.adapters.state_common import StateTimeouts
from distributor_node.shared.adapters.state_redis import RedisStateStore
from distributor_node.shared.domain.conditionals import Version
from distributor_node.shared.domain.errors import (
    CatalogUnavailable,
    SourceError,
    StateStoreUnavailable,
)
from tests.servers.rabbitmq_server import RabbitServer
from tests.servers.redis_server import RedisServer, free_port
from tests.waiting import eventually


@dataclass(frozen=True, slots=True)
class Authority:
    """A private authority, and a server's certificate of it for 127.0.0.1."""

    root: Path
    certificate: Path
    key: Path

    def trust_by_environment(self, patch: pytest.MonkeyPatch) -> None:
        patch.setenv("SSL_CERT_FILE", str(self.root))

    def server_context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.certificate, self.key)
        return context


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    folder = tmp_path_factory.mktemp("authority")

    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True, timeout=60)

    new_key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    openssl(
        "req", "-x509", *new_key, "-days", "2", "-subj", "/CN=private authority", "-keyout", "root.key",
        "-out", "root.pem",
    )  # fmt: skip
    openssl("req", *new_key, "-subj", "/CN=127.0.0.1", "-keyout", "server.key", "-out", "server.csr")
    (folder / "extensions").write_text("subjectAltName=IP:127.0.0.1\n")
    openssl(
        "x509", "-req", "-in", "server.csr", "-CA", "root.pem", "-CAkey", "root.key", "-CAcreateserial", "-days", "2",
        "-extfile", "extensions", "-out", "server.pem",
    )  # fmt: skip
    (folder / "server.key").chmod(0o644)
    return Authority(folder / "root.pem", folder / "server.pem", folder / "server.key")


@pytest.fixture(autouse=True)
def usual_authorities(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("SSL_CERT_FILE", "SSL_CERT_DIR"):
        monkeypatch.delenv(variable, raising=False)


@pytest.mark.servers
async def test_redis(authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    server = RedisServer(
        tmp_path, "--tls-port", str(port), "--tls-auth-clients", "no", "--tls-cert-file", str(authority.certificate),
        "--tls-key-file", str(authority.key), "--tls-ca-cert-file", str(authority.root),
    ).start()  # fmt: skip
    url = f"rediss://127.0.0.1:{port}/0"

    async def ping(address: str) -> None:
        store = RedisStateStore(address, "test:", 1_000_000, StateTimeouts(operation_timeout=5))
        await store.open()
        try:
            await store.ping()
        finally:
            await store.close()

    try:
        with pytest.raises(StateStoreUnavailable, match="certificate"):
            await ping(url)
        await ping(f"{url}?ssl_ca_certs={authority.root}")
        authority.trust_by_environment(monkeypatch)
        await ping(url)
    finally:
        server.kill()


@pytest.mark.servers
async def test_rabbitmq(authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    tls = {
        "listeners.ssl.default": f"127.0.0.1:{port}",
        "ssl_options.cacertfile": str(authority.root),
        "ssl_options.certfile": str(authority.certificate),
        "ssl_options.keyfile": str(authority.key),
        "ssl_options.verify": "verify_none",
    }
    url = f"amqps://guest:guest@127.0.0.1:{port}/"

    async def connect(address: str) -> str:
        """Return why it is impossible. Empty: it is possible."""
        try:
            async with open_session(address, "test", confirms=True):
                return ""
        except BROKER_ERRORS as error:
            return repr(error)

    async def connects(address: str) -> bool:
        return await connect(address) == ""

    with RabbitServer(tmp_path, tls):
        await eventually(lambda: connects(f"{url}?cafile={authority.root}"))
        assert "certificate" in (await connect(url)).lower()
        authority.trust_by_environment(monkeypatch)
        assert await connect(url) == ""


@asynccontextmanager
async def https_server(authority: Authority, body: bytes) -> AsyncIterator[str]:
    """Gives each request the same body. Yields its URL."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body)
        try:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(head + body)
            await writer.drain()
        except (asyncio.IncompleteReadError, OSError):
            return  # the client has refused the certificate
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=authority.server_context())
    async with server:
        yield f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def test_a_source(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    async def read(url: str) -> bytes:
        limits = SourceLimits(connect_timeout=5, first_byte_timeout=5, stall_timeout=5, minimum_rate=1)
        expected = Expected(Version(size=5))
        async with SourceClient(limits) as client, client.get(f"{url}/files/1", None, expected) as answer:
            return b"".join([chunk async for chunk in answer.chunks])

    async with https_server(authority, b"bytes") as url:
        with pytest.raises(SourceError, match=r"(?i)certificate"):
            await read(url)
        authority.trust_by_environment(monkeypatch)
        assert await read(url) == b"bytes"


async def test_the_squid(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    async def height(url: str) -> int | None:
        catalog = JoystreamCatalog(f"{url}/graphql", SquidLimits(), refuse_private=False)
        await catalog.open()
        try:
            return (await catalog.status()).blocks_processed
        finally:
            await catalog.close()

    body = b'{"data": {"squidStatus": {"height": 7}, "squidVersion": {"version": "1"}}}'
    async with https_server(authority, body) as url:
        with pytest.raises(CatalogUnavailable, match=r"(?i)certificate"):
            await height(url)
        authority.trust_by_environment(monkeypatch)
        assert await height(url) == 7
