"""Adds up the counters of several worker processes: prometheus-client's multiprocess mode.

prometheus-client chooses its mode when it is imported. So the process that starts the workers must call
`prepare_multiprocess` before it imports `shared/observability/metrics.py`. The workers inherit the environment.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
_ENDED = "ended"  # in place of a process id
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def prepare_multiprocess(directory: Path) -> None:
    """Turn multiprocess mode on, with files in `directory`. Old files are removed.

    Raises RuntimeError if prometheus-client is already imported, OSError if the directory cannot be used.
    """
    if "prometheus_client" in sys.modules:
        raise RuntimeError("multiprocess mode must be prepared before prometheus_client is imported")
    directory.mkdir(parents=True, exist_ok=True)
    for left_behind in directory.glob("*.db"):
        left_behind.unlink(missing_ok=True)
    os.environ[VARIABLE] = str(directory)


# Temporary directories with an owner: the process that holds an exclusive flock on them, which ends with the process.

_OWNED = ".owned"  # a file in it, made after the lock was taken
_MAX_ABANDONED = 1000


@contextmanager
def owned_directory(prefix: str) -> Iterator[Path]:
    """A temporary directory. The end of the block removes it, or the next start does if this process is killed.

    Raises OSError if it cannot be made.
    """
    _remove_abandoned(prefix)
    path = Path(tempfile.mkdtemp(prefix=prefix))
    lock = os.open(path, _DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (path / _OWNED).touch()
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def _remove_abandoned(prefix: str) -> None:
    """Remove directories of this user whose owner is dead.

    Those without the file `.owned` stay: their owner is about to take the lock, or a version before made them.
    """
    for path in islice(Path(tempfile.gettempdir()).glob(f"{prefix}*"), _MAX_ABANDONED):
        try:
            descriptor = os.open(path, _DIRECTORY)
        except OSError:
            continue  # it is gone, no directory, or another user's
        try:
            if os.fstat(descriptor).st_uid == os.geteuid() and (path / _OWNED).is_file():
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
        except BlockingIOError:
            continue  # its owner is alive
        finally:
            os.close(descriptor)


def forget_process(process_id: int) -> None:
    """Drop the live gauges of a worker that has ended, and add its other values to those of all that have ended.

    Otherwise each worker would leave its files, 64 KiB each, for ever. No effect outside multiprocess mode.
    """
    if VARIABLE not in os.environ:
        return
    from prometheus_client.multiprocess import mark_process_dead  # noqa: PLC0415 (see the module docstring)

    mark_process_dead(process_id)  # type: ignore[no-untyped-call]
    with files_locked(exclusive=True):
        for file in Path(os.environ[VARIABLE]).glob(f"*_{process_id}.db"):
            kind = file.name.removesuffix(f"_{process_id}.db")
            _add_values(file, file.with_name(f"{kind}_{_ENDED}.db"), kind)
            file.unlink()


@contextmanager
def files_locked(*, exclusive: bool = False) -> Iterator[None]:
    """Keep values from being moved between files while they are read: they would count twice, or not at all."""
    lock = Path(os.environ[VARIABLE]) / ".lock"
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
        yield
    finally:
        os.close(descriptor)


def _add_values(source: Path, target: Path, kind: str) -> None:
    """`kind`: as the file's name begins: counter, histogram, gauge_max, gauge_mostrecent."""
    from prometheus_client.mmap_dict import MmapedDict  # noqa: PLC0415 (see the module docstring)

    merged = MmapedDict(str(target))  # type: ignore[no-untyped-call]
    try:
        for key, value, timestamp, _ in MmapedDict.read_all_values_from_file(str(source)):  # type: ignore[no-untyped-call]
            known, known_at = merged.read_value(key)  # type: ignore[no-untyped-call]
            match kind:
                case "gauge_mostrecent":
                    merged_at, total = max((timestamp, value), (known_at, known))
                case "gauge_max":
                    merged_at, total = timestamp, max(known, value)
                case _:
                    merged_at, total = timestamp, known + value
            merged.write_value(key, total, merged_at)  # type: ignore[no-untyped-call]
    finally:
        merged.close()  # type: ignore[no-untyped-call]
