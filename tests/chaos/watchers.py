"""Monitors during faults: bytes on the volume, descriptors and memory of processes, their logs."""

from __future__ import annotations

import asyncio
import os
import stat
import threading
import zlib
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

FOLDERS = ("objects", "records", "incoming", "leaving")


def inodes_on_volume(volume: Path) -> dict[int, int]:
    """Size in bytes by inode, of all regular files of the volume."""
    found: dict[int, int] = {}
    for name in FOLDERS:
        for folder, _, names in os.walk(volume / name):
            for entry in names:
                try:
                    seen = os.lstat(f"{folder}/{entry}")
                except OSError:
                    continue
                if stat.S_ISREG(seen.st_mode):
                    found[seen.st_ino] = bytes_of(seen) if entry.endswith(".part") else seen.st_size
    return found


def bytes_of(partial: os.stat_result) -> int:
    """The bytes of a partial file, without its holes."""
    return min(partial.st_size, partial.st_blocks * 512)


def unlinked_but_open(volume: Path, processes: Iterable[int]) -> dict[int, int]:
    """Files without a name that processes still have open: their bytes are used, too."""
    found: dict[int, int] = {}
    for process in processes:
        for link in _descriptors(process):
            try:
                target = str(link.readlink())
                if target.startswith(str(volume)) and target.endswith(" (deleted)"):
                    seen = link.stat()
                    found[seen.st_ino] = seen.st_size
            except OSError:
                continue
    return found


@dataclass(slots=True)
class VolumeScan:
    """Sizes in bytes of the node's files, by object id; by inode of those without a name."""

    objects: dict[str, int] = field(default_factory=dict)
    partials: dict[str, int] = field(default_factory=dict)
    leaving: dict[str, int] = field(default_factory=dict)  # by file name
    unlinked: dict[int, int] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """All of them. As `du --apparent-size`, and what is unlinked and still open."""
        kinds = (self.objects, self.partials, self.leaving, self.unlinked)
        return sum(sum(kind.values()) for kind in kinds)


def scan_volume(volume: Path, processes: Iterable[int]) -> VolumeScan:
    """A scan that shares no code with the node's own. `processes` may have files without a name open."""
    found = VolumeScan(unlinked=unlinked_but_open(volume, processes))
    for path in (*volume.glob("objects/*/*"), *volume.glob("incoming/*.part"), *volume.glob("leaving/*")):
        try:
            seen = path.lstat()
        except FileNotFoundError:
            continue
        if not stat.S_ISREG(seen.st_mode):
            continue
        if path.parent.name == "incoming":
            found.partials[path.stem] = bytes_of(seen)
        elif path.parent.name == "leaving":
            found.leaving[path.name] = seen.st_size
        elif path.parent.name == f"{zlib.crc32(path.name.encode()) % 256:02x}":  # others are foreign files
            found.objects[path.name] = seen.st_size
    return found


def _descriptors(process: int) -> Iterator[Path]:
    try:
        yield from Path(f"/proc/{process}/fd").iterdir()
    except OSError:
        return


def process_tree(process: int) -> list[int]:
    """The process and all its descendants."""
    found = [process]
    for parent in found:
        try:
            for task in Path(f"/proc/{parent}/task").iterdir():
                found.extend(int(child) for child in (task / "children").read_text().split())
        except OSError:
            continue
    return found


def open_descriptors(process: int) -> int:
    """Of one process."""
    return sum(1 for _ in _descriptors(process))


def resident_bytes(process: int) -> int:
    """Of one process."""
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@dataclass(slots=True)
class VolumeMonitor:
    """`peak`: most bytes that were on the volume at one instant, files without a name included."""

    volume: Path
    processes: list[int]
    peak: int = 0
    samples: int = 0

    def sample(self) -> int:
        """A true lower bound for the instant between two listings: what is in both existed then, and was at least as
        large as the smaller of both. (One listing alone would count an evicted file with the one that took its place.)
        """
        before = inodes_on_volume(self.volume) | unlinked_but_open(self.volume, self.processes)
        after = inodes_on_volume(self.volume) | unlinked_but_open(self.volume, self.processes)
        total = sum(min(size, after[inode]) for inode, size in before.items() if inode in after)
        self.peak = max(self.peak, total)
        self.samples += 1
        return total

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Look all the time, in a thread."""
        over = threading.Event()

        def watch() -> None:
            while not over.wait(0.05):
                self.sample()

        task = asyncio.create_task(asyncio.to_thread(watch))
        try:
            yield
        finally:
            over.set()
            await task
