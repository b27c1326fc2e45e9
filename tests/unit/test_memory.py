"""What a process keeps of the memory that it has freed."""

from __future__ import annotations

import subprocess
import sys

_PAGES = """
import resource
from shared.runtime.memory import keep_freed_memory

def faults():
    begun = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(200):
        pieces = [bytes([1]) * 262_144 for _ in range(8)]
        del pieces
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - begun

before = faults()
print(keep_freed_memory())
faults()
print(faults() * 10 < before)
"""


def test_pieces_are_not_mapped_anew() -> None:
    told = subprocess.run([sys.executable, "-c", _PAGES], check=True, capture_output=True, text=True)
    assert told.stdout.split() == ["True", "True"]
