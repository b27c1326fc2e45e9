"""The request log of the squid: its queries, and how many were under way at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(slots=True)
class RequestRecord:
    """One query. Times are POSIX seconds."""

    operation: str
    variables: dict[str, Any]
    started_at: float = field(default_factory=time.time)
    finished_at: float | None = None
    status: int | None = None  # None: there was no response
    rejected: bool = False  # by validation

    @property
    def object_ids(self) -> list[str]:
        """The objects that it asks for, in a query for one or many."""
        if self.operation == "DataObjects":
            return list(self.variables.get("ids") or ())
        return [self.variables["id"]] if "id" in self.variables else []


class RequestLog:
    """The records in order of arrival."""

    def __init__(self) -> None:
        self._records: list[RequestRecord] = []
        self._changed = asyncio.Event()
        self.in_flight = 0
        self.max_in_flight = 0

    def __iter__(self) -> Iterator[RequestRecord]:
        return iter(list(self._records))

    def __len__(self) -> int:
        return len(self._records)

    def begin(self, operation: str, variables: dict[str, Any]) -> RequestRecord:
        record = RequestRecord(operation, variables)
        self._records.append(record)
        self.in_flight += 1
        self.max_in_flight = max(self.max_in_flight, self.in_flight)
        self._notify()
        return record

    def end(self, record: RequestRecord) -> None:
        record.finished_at = time.time()
        self.in_flight -= 1
        self._notify()

    def clear(self) -> None:
        self._records.clear()
        self.max_in_flight = self.in_flight

    def count_for(self, object_id: str) -> int:
        """Return the number of queries for this object, without rejected ones."""
        return sum(object_id in record.object_ids and not record.rejected for record in self._records)

    async def wait_for(self, condition: Callable[[RequestLog], bool], timeout_seconds: float = 60.0) -> None:
        """Wait until the condition holds. It is checked when a query arrives or ends."""
        async with asyncio.timeout(timeout_seconds):
            while not condition(self):
                await self._changed.wait()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def to_json(self) -> dict[str, Any]:
        records = [asdict(record) for record in self._records]
        return {"requests": records, "inFlight": self.in_flight, "maxInFlight": self.max_in_flight}
