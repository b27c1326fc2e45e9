"""Both paths respond alike: generated requests go to a node with and to one without the fast path."""

from __future__ import annotations

import asyncio
import errno
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import uvloop
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distributor_node.services.api.fast_path.handler import FastPath
from tests.compiled import needs_source
from tests.integration.assets_harness import KIB, STORED_AT, assets_harness

SIZES = {"1": 10, "2": 10_000, "3": 64 * KIB, "4": 700 * KIB, "5": 1, "6": 0}
_OF_THE_MOMENT = (
    (re.compile(rb"X-Request-ID: [0-9a-f]{32}\r\n"), b"X-Request-ID: -\r\n"),
    (re.compile(rb"Date: \w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d GMT\r\n"), b"Date: -\r\n"),
)
_LAST = b"GET /healthz HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
_QUIET = 1.0
_PATH = "/api/v1/assets/"


@dataclass
class NodePair:
    ports: tuple[int, int]
    etags: dict[str, str]
    prepared: Callable[[], int]

    def ask(self, pieces: list[bytes]) -> tuple[bytes, bytes]:
        """What a node with and one without the fast path answer; request ids of their own choice and dates left out.

        A server that closes a connection on which more arrives resets it, and the network then forgets what the
        client has not read yet: only what both clients got can be compared.
        """
        (fast, fast_reset), (slow, slow_reset) = (_ask(port, pieces) for port in self.ports)
        if fast_reset or slow_reset:
            length = min(len(fast), len(slow))  # request ids and dates have one length
            fast, slow = fast[:length], slow[:length]
        return _lasting(fast), _lasting(slow)


def _lasting(answers: bytes) -> bytes:
    for pattern, instead in _OF_THE_MOMENT:
        answers = pattern.sub(instead, answers)
    return answers


def _ask(port: int, pieces: list[bytes]) -> tuple[bytes, bool]:
    """Send the pieces, each by itself, then a last request that ends the connection. True: it was reset."""
    received = bytearray()
    with socket.create_connection(("127.0.0.1", port), timeout=_QUIET) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            for number, piece in enumerate((*pieces, _LAST)):
                if number:
                    time.sleep(0.002)
                connection.sendall(piece)
            while data := connection.recv(1 << 20):
                received += data
        except TimeoutError:
            return bytes(received), False  # the server waits for more: on both paths, or the answers differ
        except ConnectionError:
            return bytes(received), True
    return bytes(received), False


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodePair]:
    with running_nodes(tmp_path_factory.mktemp("nodes")) as running:
        yield running


@pytest.fixture
def cold_nodes(tmp_path: Path) -> Iterator[NodePair]:
    """The kernel says of nothing that it lies in the page cache: all is read in threads."""
    preadv = os.preadv

    def cold(descriptor: int, buffers: Any, offset: int, flags: int = 0) -> int:
        if flags & os.RWF_NOWAIT:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return preadv(descriptor, buffers, offset)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "preadv", cold)
        with running_nodes(tmp_path) as running:
            yield running


@contextmanager
def running_nodes(root: Path) -> Iterator[NodePair]:
    found: list[NodePair] = []
    ready, stop = threading.Event(), asyncio.Event()
    loop = uvloop.new_event_loop()

    async def serve() -> None:
        with pytest.MonkeyPatch.context() as patch:
            prepared = 0
            prepare = FastPath.prepare

            def counting(fast_path: FastPath, data: bytes, now: float) -> object:
                nonlocal prepared
                response = prepare(fast_path, data, now)
                prepared += response is not None
                return response

            patch.setattr(FastPath, "prepare", counting)
            (root / "a").mkdir()
            (root / "b").mkdir()
            async with (
                assets_harness(root / "a") as fast,
                assets_harness(root / "b", fast_lane=False) as slow,
            ):
                for harness in (fast, slow):
                    for object_id, size in SIZES.items():
                        harness.add(object_id, size)
                        harness.store(object_id)
                etags = {object_id: known.etag or "" for object_id, known in fast.catalog.objects.items()}
                found.append(NodePair((fast.port, slow.port), etags, lambda: prepared))
                ready.set()
                await stop.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    assert ready.wait(20)
    try:
        yield found[0]
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(20)
        loop.close()


_IDS = st.sampled_from(
    ["1", "2", "404", "", "..", "%31", "1%20", "1?x=1", "1#", "x" * 200, "1 ", "é", "2/3", "//2"]
)
_NUMBERS = st.one_of(st.integers(0, 80_000).map(str), st.sampled_from(["", "9" * 18, "-1", "x", "00001"]))
_RANGES = st.one_of(
    st.builds("bytes={}-{}".format, _NUMBERS, _NUMBERS),
    st.sampled_from(
        ["bytes=0-0,5-6", "Bytes=1-2", "bytes=", "bytes = 1-2", "lines=1-2", "bytes=1-2 ", "bytes=-5"]
    ),
)
_DATES = st.sampled_from([STORED_AT - 5, STORED_AT, STORED_AT + 5]).map(
    lambda at: time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(at))
)
_TAGS = st.sampled_from(["{etag}", "W/{etag}", '"other"', '"other", {etag}', "*", "broken", '"', ""])
_NAMED = st.one_of(
    st.tuples(st.sampled_from(["Range", "range", "RANGE"]), _RANGES),
    st.tuples(st.sampled_from(["If-None-Match", "if-match", "If-Range"]), _TAGS),
    st.tuples(st.sampled_from(["If-Modified-Since", "If-Unmodified-Since", "If-Range"]), _DATES),
    st.tuples(st.just("X-Request-ID"), st.sampled_from(["abc-1", "a b", "", "x" * 129, "id:7"])),
    st.tuples(st.sampled_from(["Accept", "User-Agent", "Cookie"]), st.text("abc;=/*, \t", max_size=20)),
)  # fmt: skip
_ODD = st.one_of(
    st.tuples(st.just("Connection"), st.sampled_from(["keep-alive", "Keep-Alive", "close", "upgrade", "keep-alive "])),
    st.tuples(st.sampled_from(["Host", "host"]), st.sampled_from(["b", ""])),
    st.sampled_from(
        [
            ("Expect", "100-continue"), ("Upgrade", "h2c"), ("Content-Length", "0"), ("Transfer-Encoding", "chunked"),
            ("TE", "trailers"), (" Folded", "x"), ("No Colon", "x"), ("Null", "a\0b"), ("Bare", "a\rb"), ("Latin", "é"),
            ("Name ", "x"), ("", "x"), ("Tab", "\tx\t"),
        ]
    ),
)  # fmt: skip


@st.composite
def simple_requests(draw: st.DrawFn) -> bytes:
    """For a cached object, with any ranges and conditions. `{etag}` stands for an object's entity tag."""
    method, object_id = draw(st.sampled_from(["GET", "GET", "HEAD"])), draw(st.sampled_from([*SIZES]))
    fields = draw(st.lists(_NAMED, max_size=3))
    fields.insert(draw(st.integers(0, len(fields))), ("Host", "a"))
    lines = [f"{method} {_PATH}{object_id} HTTP/1.1", *(f"{name}: {value}" for name, value in fields)]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


@st.composite
def odd_requests(draw: st.DrawFn) -> bytes:
    """Anything may be wrong with them."""
    method = draw(st.sampled_from(["GET", "HEAD", "get", "POST", "OPTIONS"]))
    version = draw(st.sampled_from(["HTTP/1.1", "HTTP/1.1", "HTTP/1.0", "HTTP/2.0", "http/1.1"]))
    path = draw(
        st.sampled_from([_PATH, _PATH, "/api/v1/Assets/", "http://a/api/v1/assets/", "/api//v1/assets/"])
    )
    fields = [("Host", "a")] * draw(st.sampled_from([1, 1, 1, 0, 2]))
    fields += draw(st.lists(st.one_of(_NAMED, _ODD), max_size=4))
    colon = draw(st.sampled_from([": ", ": ", ":", ":  ", " : "]))
    end = draw(st.sampled_from(["\r\n", "\r\n", "\r\n", "\n"]))
    lines = [f"{method} {path}{draw(_IDS)} {version}", *(f"{name}{colon}{value}" for name, value in fields)]
    return (end.join(lines) + end + end).encode()


@st.composite
def conversations(draw: st.DrawFn) -> list[bytes]:
    """One to three requests, sent one by one, or all together, or cut anywhere."""
    parts = draw(
        st.lists(st.one_of(simple_requests(), simple_requests(), odd_requests()), min_size=1, max_size=3)
    )
    if draw(st.booleans()):
        return parts
    whole = b"".join(parts)
    cuts = sorted(draw(st.sets(st.integers(1, len(whole) - 1), max_size=3)))
    return [whole[start:end] for start, end in zip([0, *cuts], [*cuts, len(whole)], strict=True)]


@pytest.mark.timeout(900)
@settings(max_examples=800, deadline=None, suppress_health_check=[*HealthCheck])
@given(conversation=conversations(), object_id=st.sampled_from([*SIZES]))
def test_both_paths_respond_alike(nodes: NodePair, conversation: list[bytes], object_id: str) -> None:
    _compare(nodes, conversation, object_id)


@needs_source
def test_the_fast_path_is_used(nodes: NodePair) -> None:
    """Else the test above compares nothing."""

    def ask(more: str) -> None:
        with socket.create_connection(("127.0.0.1", nodes.ports[0]), timeout=20) as connection:
            connection.sendall(f"GET {_PATH}2 HTTP/1.1\r\nHost: a\r\n{more}\r\n".encode())
            assert connection.recv(1 << 20)

    ask("")  # objects that are not requested for a second are dropped
    before = nodes.prepared()
    for more in ("", "Range: bytes=0-0\r\n", "If-None-Match: *\r\n"):
        ask(more)
    assert nodes.prepared() == before + 3


@pytest.mark.timeout(900)
@settings(max_examples=200, deadline=None, suppress_health_check=[*HealthCheck])
@given(conversation=conversations(), object_id=st.sampled_from([*SIZES]))
def test_both_paths_respond_alike_from_a_cold_disk(
    cold_nodes: NodePair, conversation: list[bytes], object_id: str
) -> None:
    _compare(cold_nodes, conversation, object_id)


def _compare(nodes: NodePair, conversation: list[bytes], object_id: str) -> None:
    tag = nodes.etags[object_id].encode()
    fast, slow = nodes.ask([piece.replace(b"{etag}", tag) for piece in conversation])
    assert fast == slow
