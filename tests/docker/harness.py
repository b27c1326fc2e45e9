"""The Compose stack, its storage node, and clients."""

from __future__ import annotations

import asyncio
import json
import time
import urllib.parse
import urllib.request
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from distributor_node.services.demo.faults import Fault, Match, Rule
from distributor_node.services.demo.objects import DemoObject
from tests.docker.compose import ComposeStack
from tests.end_to_end.client import Answer, get
from tests.waiting import eventually

OBJECT_SIZE = 512 * 1024
"""Of each of the objects 100 to 159, in bytes."""
NOTES: list[str] = []
"""What was measured; shown at the end of the run."""
TIMED_OUT, _TIMEOUT = -1, 90.0
"""Stands for the status of an answer that did not come within so many seconds, or whose connection was not made."""
LARGE_OBJECTS, LARGE_SIZE = ("200", "201", "202"), 40 * 1024**2
"""Together with the demo's own more than the volume may hold."""
KILLED, GROWING, ENDLESS, RELOADED = "210", "211", "212", "213"
"""Objects of LARGE_SIZE that have not been requested when the test begins that needs them."""


@dataclass(slots=True)
class Harness:
    """`objects` are those of the stack's storage node, by id. `secret`: of the operator API."""

    stack: ComposeStack
    objects: dict[str, DemoObject]
    secret: str
    failed: bool = False

    @property
    def source(self) -> str:
        return f"http://127.0.0.1:{self.stack.ports['DEMO_PORT']}"

    def behave(self, rules: Sequence[Rule]) -> None:
        """From now on the storage node follows these rules."""
        document = json.dumps({"rules": [rule.to_json() for rule in rules]}).encode()
        request = urllib.request.Request(f"{self.source}/faults", document, method="PUT")
        with urllib.request.urlopen(request, timeout=10) as answer:
            assert answer.status == 200

    def slow_down(self, bytes_per_second: int, object_id: str | None = None) -> None:
        match = Match(object_id=object_id, method="GET", endpoint="files")
        self.behave([Rule(Fault(bytes_per_second=bytes_per_second), match)])

    def requests_for(self, object_id: str) -> list[dict[str, Any]]:
        """What the storage node was asked for one object, in order."""
        log = fetch_json(f"{self.source}/requests")["requests"]
        return [record for record in log if record["path"].endswith(f"/files/{object_id}")]

    def body_of(self, object_id: str) -> bytes:
        content = self.objects[object_id].content
        return content.read(0, content.size)

    def right(self, answer: Answer, object_id: str) -> bool:
        return answer.status == 200 and answer.complete and answer.body == self.body_of(object_id)

    def prometheus(self, query: str) -> list[dict[str, Any]]:
        """The result of one instant query."""
        base = f"http://127.0.0.1:{self.stack.ports['PROMETHEUS_PORT']}/api/v1/query?"
        answer = fetch_json(base + urllib.parse.urlencode({"query": query}))
        result: list[dict[str, Any]] = answer["data"]["result"]
        return result

    async def cache_result(self, object_id: str) -> str | None:
        """`hit`, `pending` or `miss`; asked by HEAD, so that nothing changes."""
        try:
            answer = await get(self.stack.url(object_id), method="HEAD", timeout=10)
        except (OSError, TimeoutError):
            return None
        return answer.headers.get("x-cache")

    async def cached(self, object_ids: Iterable[str]) -> None:
        """Get them all, and return when all are hits."""
        wanted = list(object_ids)
        answers = await asyncio.gather(*(get(self.stack.url(object_id)) for object_id in wanted))
        assert all(self.right(answer, object_id) for answer, object_id in zip(answers, wanted, strict=True))
        for object_id in wanted:
            await self.until_hit(object_id)

    async def until_hit(self, object_id: str, timeout: float = 60) -> float:
        """Wait until the object is a hit. Returns the seconds that took."""

        async def is_hit() -> bool:
            return await self.cache_result(object_id) == "hit"

        began = time.monotonic()
        await eventually(is_hit, timeout, pause=0.1, what=f"{object_id} is a hit")
        return time.monotonic() - began

    async def until_answered(
        self, url: str, status: int, headers: dict[str, str], timeout: float = 20
    ) -> None:
        async def answered() -> bool:
            return (await get(url, headers)).status == status

        await eventually(answered, timeout, pause=0.2, what=f"{url} answers {status}")


def fetch_json(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=20) as answer:
        return json.load(answer)


@dataclass(slots=True)
class Traffic:
    """Clients that ask for one URL again and again while something happens to the stack.

    `retry_after`: seconds after which a client that was refused asks once more; None: it does not. `until_refused`: a
    client that is refused has seen all it wanted. `forwarded`: the URL is a published port, at which Docker's forwarder
    accepts first, and closes without a byte what the container then refuses; elsewhere that is a request dropped.
    """

    url: str
    body: bytes
    clients: int = 4
    retry_after: float | None = None
    until_refused: bool = False
    forwarded: bool = False
    asked: int = 0
    failures: list[str] = field(default_factory=list)
    slowest: float = 0.0
    refused: int = 0
    longest_gap: float = 0.0
    """Longest time in seconds between two answers."""
    _answered_at: float = field(default_factory=time.monotonic)
    _over: asyncio.Event = field(default_factory=asyncio.Event)
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)

    async def __aenter__(self) -> Traffic:
        self._tasks = [asyncio.create_task(self._client()) for _ in range(self.clients)]
        return self

    async def __aexit__(self, *_exception: object) -> None:
        self._over.set()
        await asyncio.gather(*self._tasks)

    async def _client(self) -> None:
        while not self._over.is_set():
            began = time.monotonic()
            answer = await self._ask()
            if answer is None:
                self.refused += 1
                if self.until_refused:
                    return
                if self.retry_after is not None:
                    await asyncio.sleep(self.retry_after)
                    answer = await self._ask()
            else:
                self.slowest = max(self.slowest, time.monotonic() - began)
            self._note(answer)
            await asyncio.sleep(0.02)

    def _note(self, answer: Answer | None) -> None:
        self.asked += 1
        if answer is None:
            self.failures.append("refused")
        elif answer.status != 200 or not answer.complete or answer.body != self.body:
            self.failures.append(f"{answer.status}, complete: {answer.complete}")

    async def _ask(self) -> Answer | None:
        """None: refused; by the host, too, once the container with its address is gone."""
        try:
            answer = await get(self.url, timeout=_TIMEOUT)
        except TimeoutError:
            return Answer(TIMED_OUT, {}, b"", complete=False, first_byte_after=0, took=_TIMEOUT)
        except OSError:
            return None
        if answer.status == 0 and self.forwarded:
            return None
        now = time.monotonic()
        self.longest_gap, self._answered_at = max(self.longest_gap, now - self._answered_at), now
        return answer
