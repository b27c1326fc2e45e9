"""CPU time and memory of processes, from /proc (proc(5))."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class ProcessStat:
    """One line of /proc/<pid>/stat: CPU time of all its threads in seconds, resident memory in bytes."""

    pid: int
    parent: int
    cpu_seconds: float
    rss_bytes: int


def parse_stat(line: str) -> ProcessStat:
    """The name in parentheses may hold anything, parentheses and spaces too: count from the last one."""
    pid, _, _ = line.partition(" ")
    fields = line[line.rindex(")") + 2 :].split()
    ticks = int(fields[11]) + int(fields[12])
    return ProcessStat(int(pid), int(fields[1]), ticks / _TICKS_PER_SECOND, int(fields[21]) * _PAGE_BYTES)


def process_tree(root: int, processes: Iterable[ProcessStat]) -> list[ProcessStat]:
    """The process and all its descendants."""
    children: dict[int, list[ProcessStat]] = {}
    found: list[ProcessStat] = []
    for process in processes:
        children.setdefault(process.parent, []).append(process)
        if process.pid == root:
            found.append(process)
    for process in found:
        found.extend(children.get(process.pid, ()))
    return found


def process_trees(roots: Iterable[int]) -> list[ProcessStat]:
    """The living descendants of these processes, themselves included."""
    everything = running()
    return [process for root in roots for process in process_tree(root, everything)]


def running() -> list[ProcessStat]:
    """All processes of this machine that we may look at."""
    found = []
    for entry in PROC.iterdir():
        if entry.name.isdigit():
            try:
                found.append(parse_stat((entry / "stat").read_text()))
            except (FileNotFoundError, ProcessLookupError):
                continue
    return found


@dataclass(frozen=True, slots=True)
class Cost:
    """CPU seconds used so far and resident bytes now, of some processes together."""

    cpu_seconds: float
    rss_bytes: int


def cost_of(roots: Iterable[int]) -> Cost:
    """Of these processes and their descendants."""
    members = process_trees(roots)
    return Cost(sum(each.cpu_seconds for each in members), sum(each.rss_bytes for each in members))


def cpu_ms_of(pid: int) -> float:
    """CPU time of the threads that one process has now, to the microsecond (Linux: scheduler/sched-stats). `cost_of`
    counts ticks of 10 ms."""
    threads = (PROC / str(pid) / "task").iterdir()
    return sum(int((thread / "schedstat").read_text().split()[0]) for thread in threads) / 1e6


def peak_rss_of(roots: Iterable[int]) -> int:
    """The most bytes that each of these and their living descendants ever had resident (VmHWM), added up."""
    return sum(_peak_rss(each.pid) for each in process_trees(roots))


def _peak_rss(pid: int) -> int:
    for line in (PROC / str(pid) / "status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0  # a zombie has none


def pin(roots: Iterable[int], cpus: frozenset[int] | None) -> None:
    """Keep all threads of these processes and their descendants on these CPUs; None leaves them free."""
    if cpus is None:
        return
    for process in process_trees(roots):
        for task in (PROC / str(process.pid) / "task").iterdir():
            try:
                os.sched_setaffinity(int(task.name), cpus)
            except ProcessLookupError:
                continue
