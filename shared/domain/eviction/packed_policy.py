"""What the policies have in common whose objects stand in packed records."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

from shared.domain.eviction.policy import PolicyEntry
from shared.domain.eviction.records import PackedRecords
from shared.domain.objects import ObjectId


class PackedPolicy:
    """The part of an EvictionPolicy that only looks."""

    _records: PackedRecords

    def __len__(self) -> int:
        return len(self._records.slots)

    def __contains__(self, object_id: object) -> bool:
        return object_id in self._records.slots

    def get(self, object_id: ObjectId) -> PolicyEntry | None:
        slot = self._records.slots.get(object_id)
        return None if slot is None else self._records.entry(slot)

    def ids(self) -> Sequence[ObjectId]:
        """The strings are those of the records: a list of a million takes 8 MB, not 80."""
        return cast("list[ObjectId]", list(self._records.slots))

    def dump(self) -> Iterator[PolicyEntry]:
        """Priorities are 0.0 where the policy has none."""
        return map(self._records.entry, self._records.slots.values())
