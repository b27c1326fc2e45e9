"""The probe server answers health, readiness and metrics, and bounds its clients."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import httpx
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from distributor_node.shared.domain.errors import ConfigurationError
from distributor_node.shared.observability import probe_server
from distributor_node.shared.observability.metrics import render_in_thread, render_openmetrics
from distributor_node.shared.observability.probe_server import Probes, ProbeServer, Readiness


class Service:
    """What the server asks: the problems that keep the service from working."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.error: Exception | None = None

    async def readiness(self) -> Readiness:
        if self.error is not None:
            raise self.error
        return Readiness(tuple(self.problems), ("catalog: timeout",))

    @property
    def probes(self) -> Probes:
        return Probes(self.readiness, render_in_thread)


@pytest.fixture
def service() -> Service:
    return Service()


@pytest.fixture
async def server(service: Service) -> AsyncIterator[ProbeServer]:
    async with ProbeServer("127.0.0.1", 0, service.probes) as server:
        yield server


@pytest.fixture
async def client(server: ProbeServer) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}") as client:
        yield client


async def test_metrics(client: httpx.AsyncClient) -> None:
    answer = await client.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert "distributor_downloads_in_progress" in answer.text


async def test_metrics_with_exemplars_are_for_those_that_accept_them(service: Service) -> None:
    probes = replace(service.probes, openmetrics=render_openmetrics)
    accepts = {"Accept": "application/openmetrics-text;version=1.0.0;q=0.75,text/plain;version=0.0.4;q=0.5"}
    async with (
        ProbeServer("127.0.0.1", 0, probes) as with_exemplars,
        ProbeServer("127.0.0.1", 0, service.probes) as without,
        httpx.AsyncClient() as client,
    ):
        url = f"http://127.0.0.1:{with_exemplars.port}/metrics"
        answer = await client.get(url, headers=accepts)
        assert answer.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
        assert answer.text.endswith("# EOF\n")
        families = list(text_string_to_metric_families(answer.text))  # type: ignore[no-untyped-call]
        assert "distributor_requests" in {family.name for family in families}
        plain = [
            await client.get(url),
            await client.get(f"http://127.0.0.1:{without.port}/metrics", headers=accepts),
        ]
    assert all(answer.headers["content-type"].startswith("text/plain") for answer in plain)


async def test_health(client: httpx.AsyncClient) -> None:
    answer = await client.get("/healthz?verbose")
    assert (answer.status_code, answer.json()) == (200, {"status": "ok"})


async def test_readiness(client: httpx.AsyncClient, service: Service) -> None:
    answer = await client.get("/readyz")
    assert (answer.status_code, answer.json()["problems"]) == (200, [])
    assert answer.json()["degraded"] == ["catalog: timeout"]
    service.problems = ["job queue out of reach"]
    answer = await client.get("/readyz")
    assert (answer.status_code, answer.json()["problems"]) == (503, ["job queue out of reach"])
    for error, message in ((OSError("no disk"), "no disk"), (KeyError("surprise"), "KeyError")):
        service.error = error
        answer = await client.get("/readyz")
        assert (answer.status_code, answer.json()["problems"]) == (503, [f"readyz failed: {message}"])


async def test_other_paths_and_methods(client: httpx.AsyncClient) -> None:
    assert (await client.get("/")).status_code == 404
    assert (await client.post("/healthz")).status_code == 405
    head = await client.head("/healthz")
    assert (head.status_code, head.content) == (200, b"")


async def test_a_request_head_is_bounded(client: httpx.AsyncClient) -> None:
    answer = await client.get("/healthz", headers={"x-long": "a" * 20_000})
    assert answer.status_code == 431


async def test_a_silent_client_is_disconnected(server: ProbeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_server, "_TIMEOUT", 0.05)
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    async with asyncio.timeout(60):
        assert await reader.read() == b""
    writer.close()
    await writer.wait_closed()


async def test_closing_does_not_wait_for_clients(service: Service) -> None:
    async with asyncio.timeout(60):
        async with ProbeServer("127.0.0.1", 0, service.probes) as server:
            reader, silent = await asyncio.open_connection("127.0.0.1", server.port)
            silent.write(b"GET /healthz HT")
            await silent.drain()
        with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
            await reader.readexactly(1)
    silent.close()


async def test_a_taken_port_is_named(server: ProbeServer, service: Service) -> None:
    with pytest.raises(ConfigurationError, match=f"cannot listen on 127.0.0.1:{server.port}: Addr"):
        async with ProbeServer("127.0.0.1", server.port, service.probes):
            pass
