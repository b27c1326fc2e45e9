"""make_film.py OUTPUT: makes the demo's film, an MP4 of 60 s and 40 MiB, from the first minute of media/5-day.mp4.

A film with the rate of a film is too large for the repository, and an encoder is not everywhere. So the samples of the
small one are written again, second by second, each second followed by noise that no table names: players skip it. The
index (moov) stands at the beginning. The same input makes the same bytes, whatever the machine.

The boxes are those of ISO/IEC 14496-12: stts, stss, stsz, stsc and stco describe the samples of a track.
"""

from __future__ import annotations

import random
import struct
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

SECONDS = 60
SIZE = 40 * 1024 * 1024
SOURCE = Path(__file__).parent / "media" / "5-day.mp4"

_CONTAINERS = {b"moov", b"trak", b"mdia", b"minf", b"stbl", b"edts"}
_DROPPED = {
    b"udta",
    b"sgpd",
    b"sbgp",
}  # descriptive, or about groups of samples that are not the same any more
_SEED = 5


@dataclass
class Box:
    """A box: its payload, or the boxes in it."""

    kind: bytes
    payload: bytes
    children: list[Box]

    def child(self, *kinds: bytes) -> Box:
        """Return the first box of each kind, one within the other. Raises ValueError if there is none."""
        found = self
        for kind in kinds:
            inner = next((box for box in found.children if box.kind == kind), None)
            if inner is None:
                raise ValueError(f"{found.kind.decode()}: expected a box {kind.decode()}, found none")
            found = inner
        return found

    def encode(self) -> bytes:
        """Return the box as bytes."""
        payload = b"".join(box.encode() for box in self.children) if self.children else self.payload
        return struct.pack(">I4s", 8 + len(payload), self.kind) + payload


def parse(data: bytes, first: int, end: int) -> Iterator[tuple[int, Box]]:
    """Yield the boxes between two positions, each with its position. Raises ValueError for a box without an end."""
    while first < end:
        size, kind = struct.unpack_from(">I4s", data, first)
        if size < 8 or first + size > end:
            raise ValueError(f"box at {first}: expected a size of 8 to {end - first}, got {size}")
        inner = [box for _, box in parse(data, first + 8, first + size)] if kind in _CONTAINERS else []
        yield (
            first,
            Box(kind, data[first + 8 : first + size], [box for box in inner if box.kind not in _DROPPED]),
        )
        first += size


@dataclass
class Sample:
    """A picture, or some milliseconds of sound."""

    data: bytes
    duration: int  # in units of the track
    is_key: bool


def numbers(box: Box, skip: int, width: int = 1) -> list[tuple[int, ...]]:
    """Return the rows of a table, after `skip` bytes before its count. Its numbers have 32 bits."""
    (count,) = struct.unpack_from(">I", box.payload, skip)
    flat = struct.unpack_from(f">{count * width}I", box.payload, skip + 4)
    return [flat[at : at + width] for at in range(0, len(flat), width)]


def samples_of(track: Box, data: bytes) -> list[Sample]:
    """Return the samples of a track, in the order of decoding."""
    table = track.child(b"mdia", b"minf", b"stbl")
    sizes = [size for (size,) in numbers(table.child(b"stsz"), 8)]
    durations = [each for count, each in numbers(table.child(b"stts"), 4, 2) for _ in range(count)]
    keys = next((numbers(box, 4) for box in table.children if box.kind == b"stss"), None)
    key_numbers = None if keys is None else {number for (number,) in keys}
    chunks = [offset for (offset,) in numbers(table.child(b"stco"), 4)]
    runs = numbers(table.child(b"stsc"), 4, 3)
    samples: list[Sample] = []
    for index, offset in enumerate(chunks, start=1):
        in_chunk = next(count for first, count, _ in reversed(runs) if first <= index)
        position = offset
        for _ in range(in_chunk):
            number = len(samples)
            size = sizes[number]
            is_key = key_numbers is None or number + 1 in key_numbers
            samples.append(Sample(data[position : position + size], durations[number], is_key))
            position += size
    return samples


def table_box(kind: bytes, before: bytes, rows: Sequence[Sequence[int]]) -> Box:
    """Return a table box: version and flags, `before`, the count, the rows."""
    flat = [number for row in rows for number in row]
    return Box(kind, bytes(4) + before + struct.pack(f">I{len(flat)}I", len(rows), *flat), [])


class Track:
    """A track of the new film, cut into one chunk for each second."""

    def __init__(self, track: Box, data: bytes) -> None:
        self.box = track
        (self.units,) = struct.unpack_from(">I", track.child(b"mdia", b"mdhd").payload, 12)
        self.seconds: list[list[Sample]] = [[] for _ in range(SECONDS)]
        clock = 0
        for sample in samples_of(track, data):
            if clock >= SECONDS * self.units:
                break
            self.seconds[clock // self.units].append(sample)
            clock += sample.duration
        self.duration = clock

    def chunk(self, second: int) -> bytes:
        """Return the bytes of one second."""
        return b"".join(sample.data for sample in self.seconds[second])

    def describe(self, offsets: Sequence[int], film_units: int) -> None:
        """Write the tables and durations. `offsets`: where the chunk of each second is in the file."""
        samples = [sample for second in self.seconds for sample in second]
        table = self.box.child(b"mdia", b"minf", b"stbl")
        kept = [
            box for box in table.children if box.kind not in {b"stts", b"stss", b"stsz", b"stsc", b"stco"}
        ]
        runs: list[list[int]] = []
        for sample in samples:
            if runs and runs[-1][1] == sample.duration:
                runs[-1][0] += 1
            else:
                runs.append([1, sample.duration])
        kept.append(table_box(b"stts", b"", runs))
        if not all(sample.is_key for sample in samples):
            keys = [[number] for number, sample in enumerate(samples, start=1) if sample.is_key]
            kept.append(table_box(b"stss", b"", keys))
        chunks = [[number, len(second), 1] for number, second in enumerate(self.seconds, start=1)]
        kept.append(table_box(b"stsc", b"", chunks))
        kept.append(table_box(b"stsz", bytes(4), [[len(sample.data)] for sample in samples]))
        kept.append(table_box(b"stco", b"", [[offset] for offset in offsets]))
        table.children = kept
        set_number(self.box.child(b"mdia", b"mdhd"), 16, self.duration)
        set_number(self.box.child(b"tkhd"), 20, SECONDS * film_units)
        set_number(self.box.child(b"edts", b"elst"), 8, SECONDS * film_units)


def set_number(box: Box, at: int, value: int) -> None:
    """Set a number of 32 bits in a box."""
    box.payload = box.payload[:at] + struct.pack(">I", value) + box.payload[at + 4 :]


def make_film(data: bytes, size: int = SIZE) -> bytes:
    """Return the film of `size` bytes. `data`: the small one. Raises ValueError if it has no such form."""
    boxes = {box.kind: box for _, box in parse(data, 0, len(data))}
    start, film = boxes[b"ftyp"], boxes[b"moov"]
    (units,) = struct.unpack_from(">I", film.child(b"mvhd").payload, 12)
    set_number(film.child(b"mvhd"), 16, SECONDS * units)
    tracks = [Track(box, data) for box in film.children if box.kind == b"trak"]
    for track in tracks:
        track.describe(
            [0] * SECONDS, units
        )  # as long as it will be, so that the place of the samples is known
    begin = len(start.encode()) + len(film.encode()) + 8
    noise = random.Random(_SEED)  # noqa: S311
    media, offsets = bytearray(), [[0] * SECONDS for _ in tracks]
    for second in range(SECONDS):
        for track, of_track in zip(tracks, offsets, strict=True):
            of_track[second] = begin + len(media)
            media += track.chunk(second)
        media += noise.randbytes(max(0, (size - begin) * (second + 1) // SECONDS - len(media)))
    for track, of_track in zip(tracks, offsets, strict=True):
        track.describe(of_track, units)
    return start.encode() + film.encode() + struct.pack(">I4s", 8 + len(media), b"mdat") + bytes(media)


def main() -> None:
    """Write the film."""
    target = Path(sys.argv[1])
    draft = target.with_name(target.name + ".new")
    draft.write_bytes(make_film(SOURCE.read_bytes()))
    draft.replace(target)


if __name__ == "__main__":
    main()
