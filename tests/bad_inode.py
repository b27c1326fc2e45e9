"""A disk that lists a file and does not tell its state."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


class Entry:
    """As `os.DirEntry`."""

    def __init__(self, entry: os.DirEntry[str], bad: str) -> None:
        self._entry, self._bad, self.name = entry, bad, entry.name

    def stat(self, *, follow_symlinks: bool) -> os.stat_result:
        if self.name == self._bad:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return self._entry.stat(follow_symlinks=follow_symlinks)


def fail_stat_of(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let scans of directories fail with EIO for the state of files of this name."""
    scandir = os.scandir

    @contextmanager
    def failing(directory: int | Path) -> Iterator[Iterator[Entry]]:
        with scandir(directory) as entries:
            yield (Entry(entry, name) for entry in entries)

    monkeypatch.setattr(os, "scandir", failing)
