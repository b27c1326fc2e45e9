"""A client of the operator API of a running node."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from dataclasses import dataclass
from typing import Any

from tests.end_to_end.client import Answer, exchange, get
from tests.preloaded import run_preloaded
from tests.servers.operator_token import SECRET, sign


@dataclass(frozen=True, slots=True)
class OperatorClient:
    """`port` is the operator API's."""

    port: int

    @property
    def environment(self) -> dict[str, str]:
        """Settings of the node."""
        return {"DISTRIBUTOR_OPERATOR_API__PORT": str(self.port), "DISTRIBUTOR_OPERATOR_API__SECRET": SECRET}

    async def ask(self, method: str, path: str, body: Any = None, token: str | None = None) -> Answer:
        """One request, signed unless a token is given; `body` None: without one."""
        url = f"/api/v1/{path}"
        signed = sign(url, body) if token is None else token
        raw = b"" if body is None else json.dumps(body).encode()
        head = (
            f"{method} {url} HTTP/1.1\r\nHost: node\r\nConnection: close\r\nAuthorization: bearer {signed}\r\n"
            f"Content-Length: {len(raw)}\r\n\r\n"
        )
        async with asyncio.timeout(60):
            return await exchange("127.0.0.1", self.port, head.encode() + raw)

    async def command(self, path: str, body: Any = None) -> Any:
        """A POST that must succeed."""
        answer = await self.ask("POST", path, body)
        assert answer.status == 200, answer
        return answer.json()

    async def query(self, path: str) -> Any:
        """A GET that must succeed."""
        answer = await self.ask("GET", path)
        assert answer.status == 200, answer
        return answer.json()


async def command(
    operator: OperatorClient, *arguments: str, stdin: str = "", **environment: str
) -> subprocess.CompletedProcess[str]:
    """`distributor operator …`, with the secret in its environment unless that says otherwise."""
    given = {"DISTRIBUTOR_OPERATOR_API__SECRET": SECRET, **environment}
    url = f"http://127.0.0.1:{operator.port}"
    return await distributor("operator", "--url", url, *arguments, stdin=stdin, **given)


async def distributor(
    *arguments: str, stdin: str = "", **environment: str
) -> subprocess.CompletedProcess[str]:
    """The console command."""
    return await asyncio.to_thread(
        run_preloaded, arguments, {**os.environ, **environment}, standard_input=stdin
    )


async def refuses_connections(port: int) -> bool:
    """Whether ten connections in a row are refused: several processes may share the port."""
    refused = 0
    for _ in range(10):
        try:
            await get(f"http://127.0.0.1:{port}/healthz", timeout=30)
        except ConnectionRefusedError:
            refused += 1
    return refused == 10


async def accepts_connections(port: int) -> bool:
    """Whether ten requests in a row are answered."""
    try:
        answers = [await get(f"http://127.0.0.1:{port}/healthz", timeout=30) for _ in range(10)]
    except OSError:
        return False
    return all(answer.status == 200 for answer in answers)
