"""How many system calls a hit takes, counted by strace in the process that serves it."""

from __future__ import annotations

import asyncio
import random
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from math import inf
from pathlib import Path

import pytest

from benchmarks.dataset import KIB, Group, fill_volume
from distributor_node.services.api.fast_path.object_cache import RESIDENT_SECONDS
from distributor_node.shared.adapters.volume import Volume
from distributor_node.shared.domain.objects import ObjectId
from tests.end_to_end.stack import Stack

GROUP = Group("hits", 20 * KIB, 2000, 10_000_000)
CONNECTIONS = 32
REQUESTS = 6400
MAX_CALLS = 3.3
_LINE = re.compile(r"^\s*[\d.]+\s+[\d.]+\s+\d+\s+(\d+)\s+(?:\d+\s+)?(\w+)$", re.MULTILINE)
_LENGTH = re.compile(rb"content-length: (\d+)\r\n", re.IGNORECASE)


def ask_all(connections: Sequence[socket.socket], object_ids: Sequence[str]) -> None:
    """Ask for the objects, one on each connection at a time, and read the whole answers."""
    for start in range(0, len(object_ids), len(connections)):
        asked = list(zip(connections, object_ids[start : start + len(connections)], strict=False))
        for connection, object_id in asked:
            connection.sendall(f"GET /api/v1/assets/{object_id} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
        for connection, _ in asked:
            received = connection.recv(64 * KIB)
            assert received.startswith(b"HTTP/1.1 200 "), received[:200]
            head, _, body = received.partition(b"\r\n\r\n")
            length = _LENGTH.search(head)
            assert length is not None
            missing = int(length[1]) - len(body)
            while missing > 0:
                missing -= len(connection.recv(64 * KIB))
            assert missing == 0


class Counting:
    """strace of one thread."""

    def __init__(self, pid: int, output: Path) -> None:
        self._output = output
        self._process = subprocess.Popen(
            ["strace", "-c", "-o", str(output), "-p", str(pid)], stderr=subprocess.PIPE, text=True
        )
        assert self._process.stderr is not None
        said = self._process.stderr.readline()
        if "attached" not in said:
            self._process.wait(10)
            pytest.skip(f"strace cannot attach to a process here: {said.strip()}")

    def stop(self) -> Mapping[str, int]:
        """Calls by name."""
        self._process.send_signal(signal.SIGINT)
        self._process.wait(30)
        assert self._process.stderr is not None
        self._process.stderr.close()
        found = {name: int(calls) for calls, name in _LINE.findall(self._output.read_text())}
        found.pop("total", None)
        return found


ATTEMPTS, PAUSE = 4, 12.0
"""A send that waited for the CPU of a busy machine makes the node ask the page cache again for ten seconds."""


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    made = Stack(tmp_path, "memory://", "memory://", "calls")
    yield made
    made.kill_all()


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
async def test_system_calls_of_a_hit(stack: Stack) -> None:
    """2,000 objects in random order: at most 3.3 calls for each. Those that are needed are read, send and sendfile."""
    volume = Volume(stack.volume)
    fill_volume(stack.volume, [GROUP])
    watch = volume.watch_changes()
    watched = watch is not None and watch.covers(ObjectId(GROUP.ids[0]))
    volume.close()
    if watch is not None:
        watch.close()
    if not watched:
        pytest.skip(f"the file system of {stack.volume} is not one of those that are watched")
    stack.write_manifest([], [])
    node = stack.add("standalone")
    await node.healthy()
    assert node.process is not None
    with ExitStack() as resources:
        connections = [
            resources.enter_context(socket.create_connection(("127.0.0.1", stack.port), timeout=60))
            for _ in range(CONNECTIONS)
        ]
        drawn = random.Random(7).choices(GROUP.ids, k=REQUESTS)
        a_request, a_hit = 0.0, dict[str, float]()
        shortest = inf
        for attempt in range(ATTEMPTS):
            ask_all(connections, GROUP.ids)  # also after a pause, in which unused files were closed
            counting = Counting(node.process.pid, stack.folder / f"strace-{attempt}.txt")
            began = time.monotonic()
            ask_all(connections, drawn)
            shortest = min(shortest, time.monotonic() - began)
            calls = counting.stop()
            a_hit = {
                name: round(count / REQUESTS, 2)
                for name, count in sorted(calls.items())
                if count * 100 > REQUESTS
            }
            a_request = sum(calls.values()) / REQUESTS
            if calls["sendfile"] > 0.9 * REQUESTS and a_request <= MAX_CALLS:
                return
            await asyncio.sleep(PAUSE)
    if shortest > RESIDENT_SECONDS:
        # Each object was asked for so rarely that the page cache was asked each time.
        pytest.skip(f"the machine is busy: {REQUESTS} hits took {shortest:.0f} s under strace")
    pytest.fail(f"{a_request:.2f} calls a hit: {a_hit}")
