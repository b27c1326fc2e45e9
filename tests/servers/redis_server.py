"""A private redis-server on a free port, that tests may stop, kill, freeze and start again."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from collections import deque
from pathlib import Path
from typing import Self

_START_SECONDS = 60.0


class RedisServer:
    """Runs until `stop`; what it wrote to `folder` survives a restart, as on a real server."""

    def __init__(self, folder: Path, *options: str) -> None:
        self._folder = folder
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None
        self.port = free_port()

    @staticmethod
    def is_installed() -> bool:
        return shutil.which("redis-server") is not None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> Self:
        """Returns when the server answers; also after `stop` or `kill`, on the same port."""
        command = [
            "redis-server",
            "--port",
            str(self.port),
            "--bind",
            "127.0.0.1",
            "--dir",
            str(self._folder),
        ]
        command += ["--save", "", "--appendonly", "yes", "--appendfsync", "everysec", *self._options]
        with (self._folder / "redis.log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        deadline = time.monotonic() + _START_SECONDS
        while not self._answers():
            if time.monotonic() > deadline or self._process.poll() is not None:
                raise RuntimeError(
                    f"redis-server did not start: {(self._folder / 'redis.log').read_text()[-2000:]}"
                )
            time.sleep(0.02)
        return self

    def stop(self) -> None:
        """An orderly stop: everything is on disk."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """As by the kernel or a power cut: no last words."""
        self._end(signal.SIGKILL)

    def freeze(self) -> None:
        """Connections stay open, nothing answers."""
        self._running().send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._running().send_signal(signal.SIGCONT)

    def restart(self) -> None:
        self.stop()
        self.start()

    async def command(self, *words: str) -> str:
        """Ask the server on a connection of its own; words without spaces only. Returns the raw reply."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write((" ".join(words) + "\r\n").encode())
            return (await reader.readline()).decode().strip()
        finally:
            writer.close()
            await writer.wait_closed()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise RuntimeError("redis-server is not running")
        return self._process

    def _end(self, how: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)
            self._process.send_signal(how)
            self._process.wait(timeout=60)
            self._process = None

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=10) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(64).startswith(b"+PONG")
        except OSError:
            return False


_recent_ports: deque[int] = deque(maxlen=500)


def free_port() -> int:
    """A port that was free a moment ago, below those that the system hands out to outgoing connections.

    Not one of the last 500 of this process, which may not listen yet. Each process of a test run has its own ports.
    """
    worker, count = (
        os.environ.get("PYTEST_XDIST_WORKER", "gw0"),
        os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"),
    )
    while True:
        port = random.randrange(12_000, 30_000)
        if port % int(count) != int(worker.removeprefix("gw")) or port in _recent_ports:
            continue
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            _recent_ports.append(port)
            return port
