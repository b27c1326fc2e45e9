"""What the squid was asked, and how many questions were under way at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(slots=True)
class QuestionRecord:
    """One question; times are seconds since the epoch. `refused`: by validation; `status` None: never answered."""

    operation: str
    variables: dict[str, Any]
    started_at: float = field(default_factory=time.time)
    finished_at: float | None = None
    status: int | None = None
    refused: bool = False


class QuestionLog:
    """The records in order of arrival."""

    def __init__(self) -> None:
        self._records: list[QuestionRecord] = []
        self._changed = asyncio.Event()
        self.under_way = 0
        self.most_under_way = 0

    def __iter__(self) -> Iterator[QuestionRecord]:
        return iter(list(self._records))

    def __len__(self) -> int:
        return len(self._records)

    def begin(self, operation: str, variables: dict[str, Any]) -> QuestionRecord:
        record = QuestionRecord(operation, variables)
        self._records.append(record)
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        self._notify()
        return record

    def end(self, record: QuestionRecord) -> None:
        record.finished_at = time.time()
        self.under_way -= 1
        self._notify()

    def clear(self) -> None:
        self._records.clear()
        self.most_under_way = self.under_way

    def asked_for(self, object_id: str) -> int:
        """How many questions named this object, refused ones aside."""
        return sum(record.variables.get("id") == object_id and not record.refused for record in self._records)

    async def wait_for(self, condition: Callable[[QuestionLog], bool], timeout_seconds: float = 5.0) -> None:
        """Wait until the condition holds, looked at when a question comes or ends."""
        async with asyncio.timeout(timeout_seconds):
            while not condition(self):
                await self._changed.wait()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def to_json(self) -> dict[str, Any]:
        records = [asdict(record) for record in self._records]
        return {"questions": records, "underWay": self.under_way, "mostUnderWay": self.most_under_way}
