"""The machine and the versions that a result was measured with."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sysconfig
from importlib.metadata import version
from math import inf
from pathlib import Path
from time import process_time

from distributor_node.services.api.fast_path import handler

_ADMIN_PATH = "/usr/local/sbin:/usr/sbin:/sbin"
_PROGRAMS = {
    "nginx": ("nginx", "-v"),
    "wrk": ("wrk", "-v"),
    "varnish": ("varnishd", "-V"),
    "redis": ("redis-server", "--version"),
    "curl": ("curl", "--version"),
}
_PACKAGES = ("sanic", "uvloop", "redis", "aio-pika", "httpx", "blake3")


def describe(folder: Path) -> dict[str, str]:
    """`folder` is where the volumes of the run lie."""
    facts = {
        "CPU": f"{_cpu_model()}, {len(os.sched_getaffinity(0))} available",
        "mitigations": mitigations(),
        "memory": f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB",
        "kernel": platform.release(),
        "system": _system(),
        "file system": _file_system(folder),
        "load before the run": f"{os.getloadavg()[0]:.2f}",
        "python": platform.python_version(),
        "python build": python_build(),
        "python speed": f"{interpreter_speed():.0f} ms for a fixed piece of work",
        "fast path": "compiled" if handler.__file__.endswith(".so") else "not compiled",
    }
    facts |= {name: found for name, command in _PROGRAMS.items() if (found := _program_version(*command))}
    return facts | {name: version(name) for name in _PACKAGES}


def mitigations(folder: Path = Path("/sys/devices/system/cpu/vulnerabilities")) -> str:
    """What the kernel does about the CPU's faults: much of the price of a system call."""
    found = []
    for file in sorted(folder.glob("*")):
        state = file.read_text().strip()
        if state != "Not affected":
            found.append(f"{file.name}: {state.removeprefix('Mitigation: ').partition(';')[0]}")
    return ", ".join(found) or "none"


def python_build() -> str:
    """The compiler, and whether `configure` was told to optimise by a profile (PGO) and when linking (LTO).

    Debian does both without telling `configure`, and keeps the flags to itself. `interpreter_speed` knows better.
    """
    flags = sysconfig.get_config_var("CONFIG_ARGS") or ""
    options = {"--enable-optimizations": "PGO", "--with-lto": "LTO"}
    told = " and ".join(name for option, name in options.items() if option in flags)
    return f"{platform.python_compiler()}, configured {'with ' + told if told else 'without a word on PGO or LTO'}"


class _Adder:
    def __init__(self, number: int) -> None:
        self.number = number

    def plus(self, other: int) -> int:
        return self.number + other


def interpreter_speed(repetitions: int = 15) -> float:
    """Milliseconds of CPU time for a fixed piece of work in Python: calls, attributes, a dictionary, short bytes.

    The least of all repetitions.
    """
    least = inf
    for _ in range(repetitions):
        began, total, seen = process_time(), 0, dict[int, bytes]()
        for number in range(100_000):
            total = _Adder(number).plus(total) & 0xFF
            seen[number & 1023] = word = b"%d" % number
            total += word.find(b"9")
        least = min(least, process_time() - began)
    return least * 1e3


def _program_version(name: str, option: str) -> str | None:
    found = shutil.which(name) or shutil.which(name, path=_ADMIN_PATH)
    if found is None:
        return None
    done = subprocess.run([found, option], capture_output=True, text=True, timeout=10, check=False)
    return parse_version(done.stdout + done.stderr)


def parse_version(text: str) -> str:
    """The first thing with a dot between numbers."""
    seen = re.search(r"\d+\.\d+(\.\d+)?", text)
    return seen[0] if seen else "?"


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _system() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except OSError:
        return platform.system()


def _file_system(folder: Path) -> str:
    done = subprocess.run(
        ["findmnt", "--noheadings", "--output", "FSTYPE", "--target", str(folder)],
        capture_output=True, text=True, timeout=10, check=False,
    )  # fmt: skip
    return done.stdout.strip() or "?"
