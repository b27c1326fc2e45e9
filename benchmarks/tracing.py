"""What tracing costs: our node with every request traced beside our node without."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import uvloop

from benchmarks.client import run_all
from benchmarks.figures import Case, Measurement, percentile, rotated
from benchmarks.misses import UnusedObjects
from benchmarks.peers import TRACED, Peer
from benchmarks.processes import OwnProcess
from tests.servers.redis_server import free_port

MISSES_AT_ONCE = 300
_CONNECTIONS = 16

TRACED_MISSES = Case("traced-miss", "misses of 64 KiB, every one traced", "misses_per_second", TRACED)


def new_for_traced_misses(rounds: int) -> int:
    """Objects that the case takes: for both contenders in each round, and in one before that does not count."""
    return 2 * MISSES_AT_ONCE * (rounds + 1)


def settings_for(collector: int) -> dict[str, str]:
    """Every request is traced, and the collector listens on this port."""
    return {
        "DISTRIBUTOR_TRACING__ENABLED": "true",
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{collector}",
        "OTEL_TRACES_SAMPLER": "parentbased_always_on",
        "NO_PROXY": "127.0.0.1",
    }


def start_collector(folder: Path) -> tuple[OwnProcess, int]:
    """Start a collector that answers 200 to everything. It does not decode, which another machine would do."""
    port = free_port()
    process = OwnProcess("collector", [sys.executable, "-m", "benchmarks.tracing", str(port)], folder)
    return process.start().wait_listening(port), port


def traced_misses(peers: Sequence[Peer], unused: UnusedObjects, rounds: int) -> Iterator[Measurement]:
    """Many new objects through each contender, in turn. RuntimeError for an error among the answers."""
    for number in range(-1, rounds):
        for peer in rotated(peers, number):
            path = urlsplit(peer.url).path
            paths = [path + unused.take() for _ in range(MISSES_AT_ONCE)]
            os.sync()
            stats = uvloop.run(run_all(peer.url, paths, _CONNECTIONS))
            if stats.errors or len(stats.latencies) != MISSES_AT_ONCE:
                raise RuntimeError(f"{peer.name}: {stats.errors} errors in {MISSES_AT_ONCE} misses")
            figures = {
                "misses_per_second": MISSES_AT_ONCE / stats.seconds,
                "p50_ms": percentile(stats.latencies, 0.5) * 1e3,
                "p99_ms": percentile(stats.latencies, 0.99) * 1e3,
            }
            if number >= 0:
                yield Measurement(TRACED_MISSES.name, peer.name, number, figures)


class _Collector(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), _Collector).serve_forever()
