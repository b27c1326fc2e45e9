"""The request log of a storage node: what was asked, and how much of the answer left."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(slots=True)
class RequestRecord:
    """One request; the fields after `headers` are filled in as the answer goes on.

    Times are seconds since the epoch. `bytes_sent` counts body bytes handed over for sending: the peer may
    have read up to the socket buffers (and 1 MiB) less. `aborted` means that the connection ended before the
    answer was complete, whoever ended it. `connection` numbers the connections of the node from 1, so equal
    numbers show a reused one.
    """

    method: str
    path: str
    connection: int
    started_at: float
    headers: dict[str, str] = field(default_factory=dict)
    status: int | None = None
    bytes_sent: int = 0
    first_byte_at: float | None = None
    finished_at: float | None = None
    aborted: bool = False

    @property
    def range(self) -> str | None:
        """The Range header, if there was one."""
        return self.headers.get("range")

    @property
    def finished(self) -> bool:
        """Whether nothing more will be sent for this request."""
        return self.finished_at is not None

    def to_json(self) -> dict[str, Any]:
        """The record as JSON, with `range` beside the headers."""
        return asdict(self) | {"range": self.range}


class RequestLog:
    """The records of one node in order of arrival; iterate, index, or wait for what is to come."""

    def __init__(self) -> None:
        self._records: list[RequestRecord] = []
        self._changed = asyncio.Event()

    def __iter__(self) -> Iterator[RequestRecord]:
        return iter(list(self._records))

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> RequestRecord:
        return self._records[index]

    def of(self, object_id: str, method: str | None = None) -> list[RequestRecord]:
        """The requests for one object, perhaps of one method only."""
        suffix = f"/files/{object_id}"
        return [
            record
            for record in self._records
            if record.path.endswith(suffix) and method in (None, record.method)
        ]

    def append(self, record: RequestRecord) -> None:
        """Add a request that has just arrived."""
        self._records.append(record)
        self.notify()

    def clear(self) -> None:
        """Forget all; requests under way are not seen again."""
        self._records.clear()

    def notify(self) -> None:
        """Wake all waiters: a record came or changed."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def wait_for(self, condition: Callable[[RequestLog], bool], timeout_seconds: float = 5.0) -> None:
        """Wait until the condition holds, looked at when a request comes, begins its body or ends."""
        async with asyncio.timeout(timeout_seconds):
            while not condition(self):
                await self._changed.wait()

    def to_json(self) -> dict[str, Any]:
        """All records as JSON."""
        return {"requests": [record.to_json() for record in self._records]}
