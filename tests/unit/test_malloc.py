"""Memory that a process keeps after freeing it."""

from __future__ import annotations

import subprocess
import sys

_PAGES = """
import resource
from distributor_node.shared.runtime.process import retain_freed_memory

def faults():
    begun = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(200):
        pieces = [bytes([1]) * 262_144 for _ in range(8)]
        del pieces
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - begun

before = faults()
print(retain_freed_memory())
faults()
print(faults() * 10 < before)
"""


def test_pieces_are_not_mapped_again() -> None:
    told = subprocess.run([sys.executable, "-c", _PAGES], check=True, capture_output=True, text=True)
    assert told.stdout.split() == ["True", "True"]


_HOLES = """
from array import array
from pathlib import Path
from distributor_node.shared.runtime.process import mmap_large_blocks

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

print(mmap_large_blocks())
bytes(30_000_000)  # freed at once: from then on glibc would take blocks of this size from the heap
before = resident()
columns = [array("d") for _ in range(7)]
for number in range(500_000):
    for column in columns:
        column.append(0.5)
grown = resident() - before
print(grown < 1.15 * 7 * 8 * 500_000 or grown)
"""


def test_columns_that_grow_leave_no_holes() -> None:
    told = subprocess.run([sys.executable, "-c", _HOLES], check=True, capture_output=True, text=True)
    assert told.stdout.split() == ["True", "True"]
