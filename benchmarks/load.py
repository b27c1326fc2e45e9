"""Load by wrk, which draws requests at random from a list and reports as JSON from its own `done` hook."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

MARK = "BENCHMARK "

# wrk calls `init` and `request` in each of its threads, `done` once. Latencies are in microseconds there.
SCRIPT = """
local requests = {}
function init(arguments)
  math.randomseed(tonumber(arguments[2]))
  for line in io.lines(arguments[1]) do
    local path, name, value = line:match("^([^\\t]*)\\t([^\\t]*)\\t([^\\t]*)$")
    local headers = {}
    if name ~= "" then headers[name] = value end
    requests[#requests + 1] = wrk.format("GET", path, headers)
  end
end
function request()
  return requests[math.random(#requests)]
end
function done(summary, latency, _)
  local errors = summary.errors
  io.write(string.format(
    'BENCHMARK {"microseconds": %d, "requests": %d, "bytes": %d, "p50": %d, "p99": %d, "longest": %d, '
    .. '"socket_errors": %d, "status_errors": %d}\\n',
    summary.duration, summary.requests, summary.bytes, latency:percentile(50), latency:percentile(99), latency.max,
    errors.connect + errors.read + errors.write + errors.timeout, errors.status))
end
"""


@dataclass(frozen=True, slots=True)
class RequestSpec:
    """One GET: the path below the host, and at most one header."""

    path: str
    header: tuple[str, str] = ("", "")


@dataclass(frozen=True, slots=True)
class Load:
    """How hard: open connections, wrk threads, seconds; `cpus` are those of wrk."""

    connections: int
    seconds: float
    threads: int = 1
    cpus: frozenset[int] | None = None
    seed: int = 1


@dataclass(frozen=True, slots=True)
class LoadResult:
    """What wrk saw. Latencies in milliseconds, `received` in bytes, heads included."""

    requests: int
    seconds: float
    received: int
    p50: float
    p99: float
    longest: float
    errors: int

    @property
    def requests_per_second(self) -> float:
        return self.requests / self.seconds

    @property
    def megabytes_per_second(self) -> float:
        """10^6 bytes."""
        return self.received / self.seconds / 1e6


def parse_result(output: str) -> LoadResult:
    """RuntimeError if the line of the `done` hook is not there."""
    for line in output.splitlines():
        if line.startswith(MARK):
            return _result(json.loads(line.removeprefix(MARK)))
    raise RuntimeError(f"wrk gave no figures:\n{output[-2000:]}")


def _result(seen: Mapping[str, int]) -> LoadResult:
    return LoadResult(
        requests=seen["requests"],
        seconds=seen["microseconds"] / 1e6,
        received=seen["bytes"],
        p50=seen["p50"] / 1e3,
        p99=seen["p99"] / 1e3,
        longest=seen["longest"] / 1e3,
        errors=seen["socket_errors"] + seen["status_errors"],
    )


def run_wrk(url: str, specs: Iterable[RequestSpec], load: Load) -> LoadResult:
    """Draw from `specs` (paths below the URL's host) for the load's time."""
    with tempfile.TemporaryDirectory(prefix="load-") as folder:
        script, requests = Path(folder, "load.lua"), Path(folder, "requests.txt")
        script.write_text(SCRIPT)
        requests.write_text("".join(f"{spec.path}\t{spec.header[0]}\t{spec.header[1]}\n" for spec in specs))
        seconds = max(1, round(load.seconds))
        command = [program(), "-t", str(load.threads), "-c", str(load.connections), "-d", f"{seconds}s"]
        command += ["--timeout", "30s", "-s", str(script), f"http://{urlsplit(url).netloc}/"]
        command += ["--", str(requests), str(load.seed)]
        if load.cpus is not None:
            command = ["taskset", "--cpu-list", ",".join(map(str, sorted(load.cpus))), *command]
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 60, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"wrk failed: {done.stdout[-1000:]}{done.stderr[-1000:]}")
    return parse_result(done.stdout)


def program() -> str:
    """RuntimeError if wrk is not installed."""
    found = shutil.which("wrk")
    if found is None:
        raise RuntimeError("wrk not found: apt-get install wrk")
    return found
