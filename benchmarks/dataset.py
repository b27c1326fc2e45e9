"""The objects that all contenders serve, and how to store them on a volume without a fetch."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from distributor_node.services.demo.manifest import content_hash
from distributor_node.services.demo.objects import DemoObject, GeneratedContent
from distributor_node.shared.adapters.volume import Volume
from distributor_node.shared.adapters.volume.layout import DIRECTORY_MODE, OBJECTS, RECORDS, shard
from distributor_node.shared.adapters.volume.records import encode_record
from distributor_node.shared.domain.conditionals import Validators
from distributor_node.shared.domain.http_caching import freshness_of
from distributor_node.shared.domain.objects import ContentHash, ObjectId, StoredRecord, entity_tag

KIB, MIB, GIB = 1024, 1024**2, 1024**3
_PIECE = 4 * MIB
_SEEDS = 4  # a few contents for all: the source keeps as many ready, and hashing them takes no time


@dataclass(frozen=True, slots=True)
class Group:
    """`count` objects of `size` bytes with consecutive numbers as ids."""

    name: str
    size: int
    count: int
    first: int

    @property
    def ids(self) -> list[str]:
        return [str(self.first + index) for index in range(self.count)]

    def objects(self) -> list[DemoObject]:
        return [self.object(object_id) for object_id in self.ids]

    def object(self, object_id: str) -> DemoObject:
        seed = int(object_id) % _SEEDS if self.size < 64 * MIB else 1
        return DemoObject(object_id, GeneratedContent(seed, self.size))

    def to_text(self) -> str:
        return f"{self.name}:{self.size}:{self.count}:{self.first}"

    @classmethod
    def from_text(cls, text: str) -> Group:
        name, size, count, first = text.split(":")
        return cls(name, int(size), int(count), int(first))


def groups(quick: bool, new: Mapping[str, int]) -> dict[str, Group]:
    """By name. Those called `new-…` are in the catalog and at the source, but on no volume at first; `new`: how many of
    each."""
    share = 10 if quick else 1
    large = 4 if quick else 1
    return {
        group.name: group
        for group in (
            Group("4k", 4 * KIB, 4000 // share, 10_000_000),
            Group("64k", 64 * KIB, 2000 // share, 20_000_000),
            Group("1m", MIB, 200 // share, 30_000_000),
            Group("64m", 64 * MIB, 8 // large, 40_000_000),
            Group("1g", GIB // large, 1, 50_000_000),
            Group("new-64k", 64 * KIB, new.get("new-64k", 0), 600_000_000),
            Group("new-1m", MIB, new.get("new-1m", 0), 700_000_000),
            Group("new-64m", 64 * MIB, new.get("new-64m", 0), 800_000_000),
            Group("new-1g", GIB // large, new.get("new-1g", 0), 900_000_000),
        )
    }


@lru_cache(maxsize=64)
def _hash(seed: int, size: int) -> str:
    return content_hash(GeneratedContent(seed, size))


def hash_of(item: DemoObject) -> str:
    """As the catalog writes it."""
    content = item.content
    if not isinstance(content, GeneratedContent):
        raise TypeError("only generated objects are measured")
    return _hash(content.seed, content.size)


def write_manifest(path: Path, chosen: Iterable[Group], base_url: str) -> None:
    """A catalog of these groups, held by one source. `base_url`: of its objects, with a slash at the end."""
    entries = [
        {
            "id": item.object_id,
            "size": item.size,
            "hash": hash_of(item),
            "media_type": item.media_type,
            "bucket": "0:1",
        }
        for group in chosen
        for item in group.objects()
    ]
    path.write_text(json.dumps({"version": 1, "base_urls": [base_url], "objects": entries}))


def record_of(item: DemoObject) -> StoredRecord:
    content = ContentHash.parse(hash_of(item))
    object_id = ObjectId.parse(item.object_id)
    etag = entity_tag(content)
    return StoredRecord(object_id, item.size, etag, content, item.media_type, int(time.time()))


def aging_record_of(item: DemoObject) -> StoredRecord:
    """Of an object that an HTTP origin has sent just now, to be fresh for a day."""
    headers = {"Cache-Control": "public, max-age=86400", "ETag": f'"{item.object_id}"'}
    now = time.time()
    record = StoredRecord(ObjectId.parse(item.object_id), item.size, None, None, item.media_type, int(now))
    freshness = freshness_of(headers, now, 0)
    return replace(record.with_validators(Validators.from_headers(headers)), freshness=freshness)


def fill_volume(
    root: Path, chosen: Iterable[Group], describe: Callable[[DemoObject], StoredRecord] = record_of
) -> None:
    """Put whole groups on a volume. The files are those that a fetch would leave; without a sync for each, but with
    one at the end. `describe`: returns the record of an object."""
    volume = Volume(root)
    volume.prepare()
    volume.close()
    for group in chosen:
        for item in group.objects():
            write_object(root, describe(item), _pieces(item))
    os.sync()


def write_object(root: Path, record: StoredRecord, pieces: Iterable[bytes]) -> None:
    """One complete object and its record; a hole of the right size if there are no pieces."""
    objects, records = (root / kind / shard(record.object_id) for kind in (OBJECTS, RECORDS))
    for folder in (objects, records):
        if not folder.exists():
            folder.mkdir(DIRECTORY_MODE)
    (records / record.object_id).write_bytes(encode_record(record))
    descriptor = os.open(objects / record.object_id, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        for piece in pieces:
            os.write(descriptor, piece)
        os.ftruncate(descriptor, record.size)
    finally:
        os.close(descriptor)


def file_on_volume(root: Path, object_id: str) -> Path:
    return root / OBJECTS / shard(object_id) / object_id


def _pieces(item: DemoObject) -> Iterator[bytes]:
    for offset in range(0, item.size, _PIECE):
        yield item.content.read(offset, _PIECE)
