"""Records for objects whose bytes are on the volume already: repaired after a loss, or imported from another node."""

from __future__ import annotations

from distributor_node.shared.domain.media_types import detect_media_type
from distributor_node.shared.domain.objects import MediaObject, StoredRecord, entity_tag


def record_for_file(
    known: MediaObject, size: int, head: bytes, stored_at: float, stated_type: str | None = None
) -> StoredRecord:
    """The record that a fetch would have written.

    `size` in bytes; `head`: the first SNIFF_BYTES bytes of the file; `stored_at`: POSIX seconds; `stated_type`: the
    media type that the former node recorded, in case the catalog has none.
    """
    return StoredRecord(
        object_id=known.object_id,
        size=size,
        etag=entity_tag(known.content_hash),  # nothing says which version bytes without a hash are
        content_hash=known.content_hash,
        media_type=detect_media_type(known.media_type or stated_type, head),
        stored_at=int(stored_at),
    )
