"""Differential fuzzing of both request parsers against nginx: `make fuzz`, or `python -m tests.fuzz --help`.

Seeded mutations of requests go to a node with the fast path, to one without it, and to an nginx that serves the same
paths. What is compared is what they mean: how many requests a server found in the same bytes, and which of them it
answered. A server may refuse what another one accepts, but then it must end the connection: nothing after that counts.
"""

from __future__ import annotations

import argparse
import logging
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import structlog

from tests.integration.test_fast_path_equivalence import SIZES, running_nodes
from tests.servers.redis_server import free_port

PATH = b"/api/v1/assets/"
LAST = b"GET " + PATH + b"5 HTTP/1.1\r\nHost: last\r\nConnection: close\r\n\r\n"
SEEDS = (
    b"GET %s1 HTTP/1.1\r\nHost: a\r\n\r\n",
    b"HEAD %s2 HTTP/1.1\r\nHost: a\r\nAccept: */*\r\n\r\n",
    b"GET %s2 HTTP/1.1\r\nHost: a\r\nRange: bytes=10-19\r\nConnection: keep-alive\r\n\r\n",
    b"GET %s1 HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
    b"GET %s1 HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nGET /",
    b"GET %s1 HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nGET /\r\n0\r\n\r\n",
    b"GET %s1 HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5;x=y\r\nGET /\r\n0\r\nTrailer: x\r\n\r\n",
    b"GET http://a%s1 HTTP/1.1\r\nHost: a\r\n\r\n",
)
TOKENS = (
    b"\r\n", b"\n", b"\r", b"\0", b" ", b"\t", b":", b",", b";", b"0", b"-1", b"+5", b"0x5", b"00000000005", b"5 ",
    b"\x0b", b"\xa0", b"Content-Length: 5\r\n", b"Content-Length: 0\r\n", b"Transfer-Encoding: chunked\r\n",
    b"Transfer-Encoding: identity\r\n", b"Transfer-Encoding : chunked\r\n", b" chunked", b"Connection: close\r\n",
    b"Connection: TE\r\n", b"Host: b\r\n", b" folded\r\n", b"Expect: 100-continue\r\n", b"HTTP/1.1", b"HTTP/1.0",
    b"HTTP/2.0", b"GET ", b"%2e%2e/", b"//", b"?", b"#",
)  # fmt: skip
NORMALISED = re.compile(rb"[^:]//|/[.]|%2e|:///|//[^ /]*//")
STATUS = re.compile(rb"HTTP/1\.[01] ([0-9]{3})[ \r]")
ENDING = {400, 408, 411, 413, 414, 417, 431, 500, 501, 503, 505}
"""Statuses after which a server closes the connection: what it makes of the rest does not matter."""

NGINX = """
daemon off; worker_processes 1; pid {folder}/pid; error_log {folder}/error.log crit;
events {{ worker_connections 256; }}
http {{
  access_log off; default_type application/octet-stream; lingering_close off;
  keepalive_timeout 5; client_header_timeout 2; client_body_timeout 2;
  client_body_temp_path {folder}/b; proxy_temp_path {folder}/p; fastcgi_temp_path {folder}/f;
  uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
  server {{ listen 127.0.0.1:{port}; root {folder}/root; }}
}}
"""


@dataclass(frozen=True, slots=True)
class Meaning:
    """What a server made of some bytes: a status for each request."""

    statuses: tuple[int, ...]
    ended: bool  # the last response announced the end of the connection, before the last request was reached

    @property
    def refused(self) -> bool:
        return bool(self.statuses) and self.statuses[-1] in ENDING

    def _read(self) -> tuple[int, ...]:
        """The statuses without that of a refusal that ended the connection."""
        return self.statuses[:-1] if self.ended and self.refused else self.statuses

    def agrees_with(self, other: Meaning, *, same_paths: bool = True) -> bool:
        """Whether both found the same requests, as far as both have read, and the same objects.

        `same_paths`: False where nginx looks for another file, since it merges slashes and resolves dots.
        """
        ours, theirs = self._read(), other._read()
        if self.ended or other.ended:
            length = min(len(ours), len(theirs))
            ours, theirs = ours[:length], theirs[:length]
        if not same_paths:
            return len(ours) == len(theirs)
        return list(map(_kind, ours)) == list(map(_kind, theirs))


def _kind(status: int) -> str:
    """Leave out what differs between a file server and the node for other reasons than the parser: tags, methods."""
    return "found" if status in (200, 206, 304, 412, 416) else "refused"


def mutate(rng: random.Random, request: bytes) -> bytes:
    """One or two changes, rarely more: most requests with many are refused for the first."""
    data = bytearray(request)
    for _ in range(rng.choice((1, 1, 1, 1, 2, 2, 3, 4))):
        place = rng.randrange(len(data) + 1)
        match rng.choice((0, 1, 2, 3, 3, 3, 3, 4, 5, 5)):
            case 0:
                data[place:place] = rng.choice(TOKENS)
            case 1 if place < len(data):
                data[place] = rng.randrange(256)
            case 2:
                del data[place : place + rng.randint(1, 4)]
            case 3:
                end = data.find(b"\r\n", place)
                if end >= 0:
                    data[end + 2 : end + 2] = rng.choice(TOKENS)
            case 4:
                data[place:place] = data[place : place + rng.randint(1, 20)]
            case _:
                lines = bytes(data).split(b"\r\n")
                lines.insert(rng.randrange(1, len(lines) + 1), rng.choice(lines))
                data = bytearray(b"\r\n".join(lines))
    return bytes(data)


def ask(port: int, request: bytes, *, patient: bool = False) -> Meaning:
    """Send the request and a last one, close the sending side, and read all responses.

    `patient`: leave the sending side open, which takes a second where a server waits for more. One that closes the
    connection all the same has ended it, although no response announced that.
    """
    received, closed = bytearray(), patient
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        try:
            connection.sendall(request + LAST)
            if patient:
                connection.settimeout(1)
            else:
                connection.shutdown(socket.SHUT_WR)
            while data := connection.recv(1 << 20):
                received += data
        except TimeoutError:
            closed = False
        except OSError:
            pass  # a reset after a refusal
    statuses = [int(status) for status in STATUS.findall(received)]
    last = received[received.rfind(b"HTTP/1.") :].partition(b"\r\n\r\n")[0].lower()
    reached_last = last.startswith(b"http/1.1 200") and b"\r\ncontent-length: 1\r\n" in last + b"\r\n"
    ended = (closed or b"\r\nconnection: close" in last) and not reached_last
    return Meaning(tuple(status for status in statuses if status >= 200), ended)


@contextmanager
def nginx(folder: Path) -> Iterator[int]:
    """Serve objects of the same names and sizes."""
    port, root = free_port(), folder / "root" / "api" / "v1" / "assets"
    root.mkdir(parents=True)
    for object_id, size in SIZES.items():
        (root / object_id).write_bytes(bytes(size))
    (folder / "nginx.conf").write_text(NGINX.format(folder=folder, port=port))
    process = subprocess.Popen(
        ["nginx", "-p", folder, "-c", folder / "nginx.conf"], stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(100):
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except OSError:
                time.sleep(0.05)
        yield port
    finally:
        process.terminate()
        process.wait(10)


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 1 if a difference or a crash was found, and print the requests."""
    parser = argparse.ArgumentParser(prog="make fuzz")
    parser.add_argument("--mutations", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--show", type=int, default=20, help="differences that are printed")
    options = parser.parse_args(arguments)
    if shutil.which("nginx") is None:
        print("nginx is not installed (Debian: nginx-light)", file=sys.stderr)  # noqa: T201
        return 2
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    rng = random.Random(options.seed)
    differences = refusals = 0
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (folder / "nodes").mkdir()
        (folder / "nginx").mkdir()
        (folder / "nginx").chmod(0o755)
        folder.chmod(0o755)
        ports = stack.enter_context(running_nodes(folder / "nodes")).ports
        reference = stack.enter_context(nginx(folder / "nginx"))
        for _ in range(options.mutations):
            request = mutate(rng, rng.choice(SEEDS) % PATH)
            theirs = ask(reference, request)
            found = {name: ask(port, request) for name, port in zip(("fast", "sanic"), ports, strict=True)}
            refusals += all(meaning.refused for meaning in found.values())
            same_paths = NORMALISED.search(request) is None
            if not all(meaning.agrees_with(theirs, same_paths=same_paths) for meaning in found.values()):
                theirs = ask(reference, request, patient=True)
                found = {
                    name: ask(port, request, patient=True)
                    for name, port in zip(("fast", "sanic"), ports, strict=True)
                }
            wrong = {
                name: meaning.statuses
                for name, meaning in found.items()
                if not meaning.agrees_with(theirs, same_paths=same_paths) or 500 in meaning.statuses
            }
            if wrong:
                differences += 1
                if differences <= options.show:
                    print(f"{request!r}\n  nginx {theirs.statuses}, {wrong}")  # noqa: T201
        if any(ask(port, b"").statuses != (200,) for port in ports):
            print("a node no longer responds")  # noqa: T201
            differences += 1
    total = f"{options.mutations} mutations, seed {options.seed}"
    print(f"{total}: {differences} differences, {refusals} refused by the node")  # noqa: T201
    return int(differences > 0)


if __name__ == "__main__":
    sys.exit(main())
