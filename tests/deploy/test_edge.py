"""The edge by itself: what it asks the API again, whom it takes for the client, and how it is set up."""

from __future__ import annotations

import asyncio
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.deploy.edge_server import (
    EDGE,
    START,
    Edge,
    ScriptedApi,
    edge,
    make_certificate,
    needs_nginx,
    render,
)
from tests.docker.compose import free_ports

ASSET = "/api/v1/assets/1"


async def ask(
    one: Edge,
    path: str = ASSET,
    headers: str = "",
    *,
    host: str = "127.0.0.1",
    first: bytes = b"",
    tls: bool = False,
) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of one GET; `first` goes before it on the connection."""
    context = None
    if tls:
        context = ssl.create_default_context(cafile=str(one.folder / "tls" / "certificate.pem"))
        context.check_hostname = False
    port = one.tls_port if tls else one.port
    async with asyncio.timeout(30):
        reader, writer = await asyncio.open_connection(host, port, ssl=context)
        try:
            writer.write(
                first
                + f"GET {path} HTTP/1.1\r\nHost: node.example\r\nConnection: close\r\n{headers}\r\n".encode()
            )
            head, _, body = (await reader.read()).partition(b"\r\n\r\n")
            while piece := await reader.read():
                body += piece
        finally:
            writer.close()
    status, *lines = head.decode().split("\r\n")
    return (
        int(status.split()[1]),
        {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)},
        body,
    )


@needs_nginx
async def test_what_the_api_accepts_and_closes_is_asked_for_once_more(tmp_path: Path) -> None:
    async with edge(tmp_path) as one:
        one.api.script = ["close"]
        status, _, body = await ask(one)
        assert (status, body) == (200, one.api.body)
        assert len(one.api.heads) == 2


@needs_nginx
async def test_a_request_that_is_never_answered_is_asked_for_twice_at_most(tmp_path: Path) -> None:
    """What makes a process end must not be repeated for a minute and a half."""
    async with edge(tmp_path) as one:
        one.api.script = ["close"] * 20
        status, headers, body = await ask(one)
        assert (status, headers["content-type"]) == (503, "application/json")
        assert headers["retry-after"] == "5"
        assert b'"unavailable"' in body
        await asyncio.sleep(1.5)  # longer than from one attempt to the next
        assert len(one.api.heads) == 2


@needs_nginx
async def test_a_request_waits_for_an_api_that_refuses(tmp_path: Path) -> None:
    async with edge(tmp_path, listening=False) as one:
        waiting = asyncio.create_task(ask(one))
        await asyncio.sleep(2.5)  # several attempts are refused
        assert not waiting.done()
        await one.api.listen()
        status, _, body = await waiting
        assert (status, body) == (200, one.api.body)


@needs_nginx
async def test_after_the_wait_too_there_is_one_retry(tmp_path: Path) -> None:
    async with edge(tmp_path, listening=False) as one:
        one.api.script = ["close"] * 20
        waiting = asyncio.create_task(ask(one))
        await asyncio.sleep(1.5)
        await one.api.listen()
        status, headers, _ = await waiting
        assert (status, headers["content-type"]) == (503, "application/json")
        assert len(one.api.heads) == 2


@needs_nginx
@pytest.mark.parametrize("own", [502, 503, 504])
async def test_the_api_s_own_errors_are_passed_on_and_not_repeated(tmp_path: Path, own: int) -> None:
    async with edge(tmp_path) as one:
        one.api.script = [own]
        status, _, body = await ask(one)
        assert (status, body) == (own, one.api.body)
        assert len(one.api.heads) == 1


@needs_nginx
async def test_a_reload_ends_no_answer(tmp_path: Path) -> None:
    async with edge(tmp_path) as one:
        one.api.body = bytes(4 * 1024**2)
        one.api.go_on = asyncio.Event()
        answer = asyncio.create_task(ask(one))
        await one.api.half_sent.wait()
        one.reload()
        await asyncio.sleep(1)
        one.api.go_on.set()
        status, _, body = await answer
        assert (status, len(body)) == (200, len(one.api.body))


@needs_nginx
async def test_the_client_is_the_peer_unless_a_balancer_is_trusted(tmp_path: Path) -> None:
    async with edge(tmp_path) as one:
        await ask(one, headers="X-Forwarded-For: 192.0.2.9\r\n")
        assert "X-Forwarded-For: 127.0.0.1\r\n" in one.api.heads[-1]


@needs_nginx
async def test_a_trusted_balancer_names_the_client(tmp_path: Path) -> None:
    """The last address that is no balancer's; what a client wrote before it is not believed."""
    async with edge(tmp_path, EDGE_TRUSTED_PROXIES="127.0.0.0/8 10.0.0.0/8") as one:
        forwarded = "X-Forwarded-For: 203.0.113.1, 192.0.2.9, 10.1.2.3\r\nX-Forwarded-Proto: https\r\n"
        await ask(one, headers=forwarded)
        assert "X-Forwarded-For: 192.0.2.9\r\n" in one.api.heads[-1]
        assert "X-Forwarded-Proto: https\r\n" in one.api.heads[-1]


@needs_nginx
async def test_the_proxy_protocol_names_the_client(tmp_path: Path) -> None:
    async with edge(tmp_path, EDGE_TRUSTED_PROXIES="127.0.0.1", EDGE_PROXY_PROTOCOL="on") as one:
        status, _, _ = await ask(one, first=b"PROXY TCP4 192.0.2.9 127.0.0.1 4000 8080\r\n")
        assert status == 200
        assert "X-Forwarded-For: 192.0.2.9\r\n" in one.api.heads[-1]


@needs_nginx
async def test_clients_behind_one_balancer_are_counted_each(tmp_path: Path) -> None:
    async with edge(tmp_path, EDGE_TRUSTED_PROXIES="127.0.0.1", EDGE_CONNECTIONS_PER_ADDRESS="1") as one:
        one.api.go_on = asyncio.Event()
        first = asyncio.create_task(ask(one, headers="X-Forwarded-For: 192.0.2.1\r\n"))
        await one.api.half_sent.wait()
        status, _, _ = await ask(one, headers="X-Forwarded-For: 192.0.2.1\r\n")
        assert status == 429
        other = asyncio.create_task(ask(one, headers="X-Forwarded-For: 192.0.2.2\r\n"))
        one.api.go_on.set()
        assert [(await first)[0], (await other)[0]] == [200, 200]


@needs_nginx
async def test_http_is_sent_to_https_but_for_what_acme_asks(tmp_path: Path) -> None:
    make_certificate(tmp_path)
    async with edge(tmp_path, EDGE_HTTPS_REDIRECT="on", EDGE_HSTS="31536000") as one:
        status, headers, _ = await ask(one, ASSET + "?download=1")
        assert status == 308
        assert headers["location"] == f"https://node.example:{one.tls_port}{ASSET}?download=1"
        assert "strict-transport-security" not in headers
        challenge = tmp_path / "acme" / ".well-known" / "acme-challenge"
        challenge.mkdir(parents=True)
        (challenge / "token").write_text("proof")
        assert (await ask(one, "/.well-known/acme-challenge/token"))[::2] == (200, b"proof")
        status, headers, body = await ask(one, tls=True)
        assert (status, body) == (200, one.api.body)
        assert headers["strict-transport-security"] == "max-age=31536000"
        missing = await ask(one, "/nothing", tls=True)
        assert missing[0] == 404
        assert missing[1]["strict-transport-security"] == "max-age=31536000"


@needs_nginx
async def test_a_balancer_that_ends_tls_is_not_redirected(tmp_path: Path) -> None:
    async with edge(tmp_path, EDGE_HTTPS_REDIRECT="on", EDGE_TRUSTED_PROXIES="127.0.0.1") as one:
        assert (await ask(one, headers="X-Forwarded-Proto: https\r\n"))[0] == 200
        status, headers, _ = await ask(one, headers="X-Forwarded-Proto: http\r\n")
        assert (status, headers["location"]) == (308, f"https://node.example{ASSET}")


@needs_nginx
@pytest.mark.skipif(not Path("/proc/net/if_inet6").exists(), reason="no IPv6 in this kernel")
async def test_it_listens_on_ipv6(tmp_path: Path) -> None:
    async with edge(tmp_path) as one:
        assert (await ask(one, host="::1"))[0] == 200


@needs_nginx
@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"EDGE_PROXY_PROTOCOL": "yes"}, "EDGE_PROXY_PROTOCOL: expected on or off, got 'yes'"),
        ({"EDGE_PROXY_PROTOCOL": "on"}, "EDGE_PROXY_PROTOCOL: on needs EDGE_TRUSTED_PROXIES"),
        ({"EDGE_TRUSTED_PROXIES": "10.0.0.0/8; load_module x"}, "EDGE_TRUSTED_PROXIES: expected addresses"),
        ({"EDGE_CLIENT_ADDRESS_HEADER": "X Y"}, "EDGE_CLIENT_ADDRESS_HEADER: expected the name of a header"),
        ({"EDGE_HTTPS_REDIRECT": "on"}, "EDGE_HTTPS_REDIRECT: on needs TLS"),
        ({"EDGE_HSTS": "1y"}, "EDGE_HSTS: expected a whole number, got '1y'"),
        ({"EDGE_HTTP3": "on"}, "EDGE_HTTP3: on needs certificate.pem"),
        ({"EDGE_CONNECTIONS_PER_ADDRESS": "many"}, "EDGE_CONNECTIONS_PER_ADDRESS: expected a whole number"),
    ],
    ids=lambda one: "" if isinstance(one, str) else "-".join(one),
)
def test_settings_that_cannot_be_are_refused_by_name(
    tmp_path: Path, settings: dict[str, str], named: str
) -> None:
    refused = render(tmp_path, settings)
    assert refused.returncode == 2
    assert refused.stderr.startswith(f"edge: {named}")


@needs_nginx
def test_http3_is_there_where_nginx_has_it(tmp_path: Path) -> None:
    make_certificate(tmp_path)
    built = subprocess.run(["nginx", "-V"], check=True, capture_output=True, text=True).stderr
    rendered = render(tmp_path, {"EDGE_HTTP3": "on"})
    if "--with-http_v3_module" in built:
        text = (tmp_path / "conf.d" / "distributor.conf").read_text()
        assert "listen 8443 quic reuseport;" in text
        assert "h3=" in text
    else:
        assert rendered.returncode == 2
        assert "has no HTTP/3" in rendered.stderr


def test_answers_get_hours_after_a_reload() -> None:
    (line,) = [
        line for line in (EDGE / "nginx.conf").read_text().splitlines() if "worker_shutdown_timeout" in line
    ]
    assert line.endswith("h;")


def test_start_sh_is_plain_sh() -> None:
    assert START.read_text().startswith("#!/bin/sh\n")
    subprocess.run(["sh", "-n", START], check=True)
    assert START.stat().st_mode & 0o111 or sys.platform == "win32"


@asynccontextmanager
async def several(
    folder: Path, balance: str = "hash", ports: Sequence[int] = ()
) -> AsyncIterator[tuple[Edge, list[ScriptedApi]]]:
    """An edge in front of three nodes, or of one at each of these ports."""
    nodes = [ScriptedApi(port) for port in ports or free_ports(3)]
    for node in nodes:
        node.body = str(node.port).encode()
        await node.listen()
    upstreams = " ".join(f"127.0.0.1:{node.port}" for node in nodes)
    try:
        async with edge(folder, EDGE_UPSTREAMS=upstreams, EDGE_BALANCE=balance) as one:
            yield one, nodes
    finally:
        for node in nodes:
            await node.close()


@needs_nginx
async def test_an_object_has_its_node_whatever_the_query(tmp_path: Path) -> None:
    async with several(tmp_path) as (one, nodes):
        for number in range(60):
            paths = (
                f"/api/v1/assets/{number}",
                f"/api/v1/assets/{number}?download",
                f"/api/v1/assets/{number}/",
            )
            answers = {(await ask(one, path))[2] for path in (*paths, *paths)}
            assert len(answers) == 1
        shares = [len(node.heads) for node in nodes]
        assert sum(shares) == 360
        assert min(shares) >= 50


@needs_nginx
async def test_the_next_node_in_line_is_asked_if_one_fails_and_the_others_keep_their_objects(
    tmp_path: Path,
) -> None:
    async with several(tmp_path) as (one, nodes):
        paths = [f"/api/v1/assets/{number}" for number in range(40)]
        before = {path: (await ask(one, path))[2] for path in paths}
        await nodes[0].close()
        for path, owner in before.items():
            status, _, body = await ask(one, path)
            assert status == 200
            assert body == owner or owner == nodes[0].body
            assert body != nodes[0].body


@needs_nginx
async def test_one_node_more_takes_objects_and_moves_no_others(tmp_path: Path) -> None:
    ports, owners = free_ports(3), list[dict[str, bytes]]()
    for count in (2, 3):
        folder = tmp_path / str(count)
        folder.mkdir()
        async with several(folder, ports=ports[:count]) as (one, _):
            paths = [f"/api/v1/assets/{number}" for number in range(60)]
            owners.append({path: (await ask(one, path))[2] for path in paths})
    before, after = owners
    moved = [path for path in before if after[path] != before[path]]
    assert {after[path] for path in moved} == {str(ports[2]).encode()}


@needs_nginx
async def test_a_node_that_closes_without_an_answer_is_replaced_by_the_next_one(tmp_path: Path) -> None:
    async with several(tmp_path) as (one, nodes):
        for node in nodes:
            node.script = ["close"]
        status, _, _ = await ask(one)
        assert status == 503  # asked twice, which is the most
        assert sum(len(node.heads) for node in nodes) == 2
        assert (await ask(one, "/api/v1/assets/2"))[0] == 200


@needs_nginx
async def test_the_least_busy_node_can_be_asked_instead(tmp_path: Path) -> None:
    async with several(tmp_path, "least_conn") as (one, nodes):
        for _ in range(30):
            assert (await ask(one))[0] == 200
        assert min(len(node.heads) for node in nodes) > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"EDGE_UPSTREAMS": "cell-a"}, "EDGE_UPSTREAMS: expected HOST:PORT, got 'cell-a'"),
        ({"EDGE_UPSTREAMS": "cell-a:port"}, "EDGE_UPSTREAMS: expected HOST:PORT, got 'cell-a:port'"),
        ({"EDGE_UPSTREAMS": "a:1;"}, "EDGE_UPSTREAMS: expected HOST:PORT, got 'a:1;'"),
        (
            {"EDGE_UPSTREAMS": "a:1", "EDGE_BALANCE": "random"},
            "EDGE_BALANCE: expected hash or least_conn, got 'random'",
        ),
        ({"EDGE_UPSTREAMS": "a:1", "EDGE_SENDFILE_TYPE": "X-Accel-Redirect"}, "ACCEL_REDIRECT_PREFIX"),
    ],
)
def test_upstreams_that_cannot_work_are_refused(
    tmp_path: Path, settings: dict[str, str], message: str
) -> None:
    done = render(tmp_path, settings)
    assert done.returncode == 2
    assert message in done.stderr
