"""Partial files on the volume, as the evictor needs them: scan, size, removal under the writer's lock.

All functions are blocking: call them from a worker thread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from distributor_node.shared.adapters.volume import FoundPartial, UnknownFile, Volume
from distributor_node.shared.domain.objects import ObjectId, StoredRecord


def scan_partial_files(volume: Volume) -> tuple[Mapping[ObjectId, FoundPartial], Sequence[UnknownFile]]:
    """All partial files by object, and the foreign and unreadable files among them."""
    found: dict[ObjectId, FoundPartial] = {}
    others: list[UnknownFile] = []
    for seen in volume.scan_partials():
        if isinstance(seen, FoundPartial):
            found[seen.object_id] = seen
        else:
            others.append(seen)
    return found, others


def partial_file_exists(volume: Volume, object_id: ObjectId) -> bool:
    reader = volume.open_partial(object_id)
    if reader is None:
        return False
    reader.close()
    return True


def expected_bytes(volume: Volume, object_id: ObjectId, at_least: int) -> int:
    """How large a partial file may grow: the size in its sidecar, but not less than `at_least`."""
    sidecar = volume.partial_record(object_id)
    return at_least if sidecar is None else max(at_least, sidecar.size)


def discard_partial_file(volume: Volume, object_id: ObjectId, size: int) -> None:
    """Remove a partial file and its sidecar. PartialHeld if its writer is alive."""
    volume.open_partial_for_writing(
        StoredRecord(object_id, size, '""', None, "application/octet-stream", 0), write_sidecar=False
    ).discard()
