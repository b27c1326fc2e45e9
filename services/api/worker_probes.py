"""Health, readiness and metrics of all workers of a supervisor, which asks each of them over its Unix socket.

A worker that is absent (it died and is about to be restarted) does not make the node unhealthy: the supervisor replaces
it. A worker that accepts a connection and does not respond does: nothing but a restart helps.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from distributor_node.shared.observability.probe_server import Probes, Readiness

_HEALTH_TIMEOUT = 1.5  # seconds for one worker; the probe server allows 5 for one request
_READINESS_TIMEOUT = 4.0
_METRICS_TIMEOUT = 3.0


@dataclass(frozen=True, slots=True)
class _Response:
    media_type: str
    body: bytes


class WorkerProbes:
    """Answers for all workers."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """`paths`: the socket of each worker, the first one's first."""
        self._paths = dict(enumerate(paths, start=1))
        self._started: set[int] = set()  # workers that have responded at least once

    def probes(self) -> Probes:
        """Return the probes for the supervisor's ProbeServer."""
        return Probes(self._readiness, self._metrics, self._liveness)

    async def wait_started(self, interval: float = 0.1) -> None:
        """Return when every worker has responded once."""
        while len(self._started) < len(self._paths):
            await self._liveness()
            await asyncio.sleep(interval)

    async def _liveness(self) -> list[str]:
        responses = await self._ask_all("/healthz", _HEALTH_TIMEOUT)
        problems = []
        for number, response in responses.items():
            if isinstance(response, TimeoutError):
                problems.append(f"worker {number} does not respond")
            elif isinstance(response, OSError) and number not in self._started:
                problems.append(f"worker {number} has not started")
        return problems

    async def _readiness(self) -> Readiness:
        problems: dict[str, None] = {}
        degraded: dict[str, None] = {}
        responses = await self._ask_all("/readyz", _READINESS_TIMEOUT)
        if all(isinstance(response, Exception) for response in responses.values()):
            problems["no worker responds"] = None
        for number, response in responses.items():
            if isinstance(response, Exception):
                degraded[f"worker {number} does not respond"] = None
            else:
                report = json.loads(response.body)
                problems.update(dict.fromkeys(report["problems"]))
                degraded.update(dict.fromkeys(report["degraded"]))
        return Readiness(tuple(problems), tuple(degraded))

    async def _metrics(self) -> tuple[bytes, str]:
        """Return the metrics as one worker reports them: in multiprocess mode those of all.

        Raises ConnectionError if no worker responds.
        """
        for number, response in (await self._ask_all("/healthz", _HEALTH_TIMEOUT)).items():
            if isinstance(response, _Response):
                metrics = await self._ask(number, "/metrics", _METRICS_TIMEOUT)
                return metrics.body, metrics.media_type
        raise ConnectionError("no worker responds")

    async def _ask_all(self, path: str, timeout: float) -> dict[int, _Response | OSError]:
        """Return what each worker responded, or why it did not; TimeoutError: it accepted and did not respond."""

        async def ask(number: int) -> _Response | OSError:
            try:
                return await self._ask(number, path, timeout)
            except OSError as error:
                return error

        responses = await asyncio.gather(*(ask(number) for number in self._paths))
        return dict(zip(self._paths, responses, strict=True))

    async def _ask(self, number: int, path: str, timeout: float) -> _Response:
        """Send one GET. Raises OSError."""
        async with asyncio.timeout(timeout):
            reader, writer = await asyncio.open_unix_connection(self._paths[number])
            try:
                writer.write(f"GET {path} HTTP/1.1\r\nHost: worker\r\n\r\n".encode())
                head, _, body = (await reader.read()).partition(b"\r\n\r\n")
            finally:
                writer.close()
        media_types = [
            line.partition(b": ")[2] for line in head.split(b"\r\n") if line.startswith(b"Content-Type: ")
        ]
        if not media_types:
            raise ConnectionResetError("the worker closed the connection")
        self._started.add(number)
        return _Response(media_types[0].decode(), body)
