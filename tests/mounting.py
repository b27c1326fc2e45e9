"""File systems that a test mounts for itself."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_file_system(folder: Path, size: str) -> Iterator[None]:
    """One of `size` (as `mount -o size=` has it) at `folder`, which exists. Skips the test where the user may not
    mount."""
    mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder))
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def mount(*words: str) -> None:
    """Skips the test where the user may not; what goes wrong otherwise is an error."""
    done = subprocess.run(
        ["mount", *words], capture_output=True, text=True, check=False, env={**os.environ, "LC_ALL": "C"}
    )
    why = done.stderr.strip()
    if done.returncode and (os.geteuid() != 0 or "permission denied" in why or "must be superuser" in why):
        pytest.skip(f"this user may not mount file systems: {why}")
    assert done.returncode == 0, why
