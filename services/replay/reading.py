"""Log files into a recording: line by line, plain or gzip, a sample of the objects if asked."""

from __future__ import annotations

import gzip
import hashlib
import io
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import yaml

from services.replay.log_lines import Unreadable, is_size, parse_line
from services.replay.recording import Recording
from shared.domain.errors import ConfigurationError
from shared.domain.objects import ObjectId

_MAX_LINE = 64 * 1024
_REPORT_INTERVAL = 1000
_SAMPLE_STEPS = 2**32


@dataclass(slots=True)
class LinesRead:
    """What became of the lines. `other`: readable, but no answer with an object."""

    counted: int = 0
    other: int = 0
    unreadable: int = 0
    not_sampled: int = 0


def read_logs(
    paths: Iterable[Path], recording: Recording, sample: float, progress: Callable[[int], None]
) -> LinesRead:
    """`sample`: share of the objects to keep, chosen by a hash of their ids, so that all requests for one are kept or
    none (the cache must then be as much smaller). `progress` is told the bytes of file read since it was last told."""
    counts = LinesRead()
    for path in paths:
        with _opened(path) as (raw, lines):
            before = 0
            for number, line in enumerate(lines):
                if number % _REPORT_INTERVAL == 0:
                    progress(raw.tell() - before)
                    before = raw.tell()
                _add_line(line, recording, sample, counts)
            progress(raw.tell() - before)
    return counts


def _add_line(line: bytes, recording: Recording, sample: float, counts: LinesRead) -> None:
    try:
        parsed = parse_line(line.decode("utf-8", "replace"))
    except Unreadable:
        counts.unreadable += 1
        return
    if parsed is None:
        counts.other += 1
    elif not _sampled(parsed.object_id, sample):
        counts.not_sampled += 1
    else:
        counts.counted += 1
        recording.add(parsed)


def _sampled(object_id: ObjectId, sample: float) -> bool:
    if sample >= 1:
        return True
    digest = hashlib.blake2b(object_id.encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") < sample * _SAMPLE_STEPS


@contextmanager
def _opened(path: Path) -> Iterator[tuple[IO[bytes], Iterator[bytes]]]:
    """The file, whose position tells how far it has been read, and its lines; a gzip file is known by its content."""
    try:
        with path.open("rb") as raw:
            packed = raw.peek(2)[:2] == b"\x1f\x8b"
            text: IO[bytes] = io.BufferedReader(gzip.GzipFile(fileobj=raw)) if packed else raw
            yield raw, iter(lambda: text.readline(_MAX_LINE), b"")
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigurationError(f"{path}: cannot be read: {error}") from error


def read_sizes(path: Path) -> dict[str, int]:
    """Sizes in bytes by id, from a manifest (YAML or JSON). Raises ConfigurationError."""
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
        sizes = {
            str(item["id"]): int(item["size"]) for item in document["objects"] if item.get("size") is not None
        }
        if any(not is_size(size) for size in sizes.values()):
            raise ValueError("a size that no object can have")
        return sizes
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigurationError(f"{path}: cannot be read: {error}") from error
    except (TypeError, KeyError, ValueError, AttributeError, OverflowError) as error:
        raise ConfigurationError(f"{path}: no manifest: want a list `objects` with id and size") from error
