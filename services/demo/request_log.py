"""The request log of a storage node: requests, and how much of their responses was sent."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(slots=True)
class RequestRecord:
    """One request. The fields after `headers` are set while the response is sent. Times are POSIX seconds."""

    method: str
    path: str
    connection: int  # number of the connection, from 1; equal numbers mean a reused connection
    started_at: float
    headers: dict[str, str] = field(default_factory=dict)
    status: int | None = None
    bytes_sent: int = (
        0  # of the body, passed to the kernel or buffered; the peer may have read up to 1 MiB less
    )
    first_byte_at: float | None = None
    finished_at: float | None = None
    aborted: bool = False  # the connection ended before the response was complete, on either side

    @property
    def range(self) -> str | None:
        """The Range header, if there was one."""
        return self.headers.get("range")

    @property
    def finished(self) -> bool:
        """Whether the response has ended."""
        return self.finished_at is not None

    def to_json(self) -> dict[str, Any]:
        """Return the record as JSON, with `range` in addition to the headers."""
        return asdict(self) | {"range": self.range}


class RequestLog:
    """The records of one node in order of arrival. They can be iterated, indexed and waited for."""

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
        """Return the requests for one object, of one method if given."""
        suffix = f"/files/{object_id}"
        return [
            record
            for record in self._records
            if record.path.endswith(suffix) and method in (None, record.method)
        ]

    def append(self, record: RequestRecord) -> None:
        """Add a new request."""
        self._records.append(record)
        self.notify()

    def clear(self) -> None:
        """Remove all records, including those of requests under way."""
        self._records.clear()

    def notify(self) -> None:
        """Wake all waiters after a record was added or changed."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def wait_for(self, condition: Callable[[RequestLog], bool], timeout_seconds: float = 60.0) -> None:
        """Wait until the condition holds. It is checked when a request arrives, begins its body or ends."""
        async with asyncio.timeout(timeout_seconds):
            while not condition(self):
                await self._changed.wait()

    def to_json(self) -> dict[str, Any]:
        """Return all records as JSON."""
        return {"requests": [record.to_json() for record in self._records]}
