"""The model of `model.py` over a real Redis, which is killed, restarted, emptied and full.

Only the clock is the test's: the scripts read it from a key, and what expires is moved with it. So a rule moves the
time of the server as a whole, in both directions, and no example waits.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

from redis.asyncio import Redis

from distributor_node.shared.adapters.state_redis import RedisStateStore, connection
from distributor_node.shared.adapters.state_redis.caches import RedisSharedCatalogCache
from distributor_node.shared.adapters.state_redis.connection import Script
from distributor_node.shared.domain.objects import MediaObject, ObjectId
from distributor_node.shared.ports.catalog import NewAnswer
from tests.chaos.model import Node
from tests.chaos.model_parts import LIMIT
from tests.servers.redis_server import RedisServer

PREFIX = "model:"
ANSWERS = 200
"""Of the catalog, some 350 KB in all: more than a tenth of what a server with this model's index uses."""

_CLOCK = "clock-of-the-model"
_TIME = "local clock = redis.call('TIME')"
_LARGEST_LOG = 1024 * 1024  # bytes: a restart reads it

# Whatever expires does so at a time of this clock
_SET_CLOCK = """#!lua flags=allow-oom
local before = redis.call('GET', KEYS[1])
redis.call('SET', KEYS[1], ARGV[1])
local passed = before and tonumber(ARGV[1]) - tonumber(before) or 0
if passed == 0 then return end
for _, key in ipairs(redis.call('KEYS', '*')) do
  local left = redis.call('PTTL', key)
  if left >= 0 then
    if left <= passed then redis.call('DEL', key) else redis.call('PEXPIRE', key, left - passed) end
  end
end
"""


class ModelServer(RedisServer):
    """Writes each command to its log before it replies, so that the log up to any reply is a state that it had."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, "--appendfsync", "no", "--auto-aof-rewrite-percentage", "0")
        self._folder = folder

    def log_size(self) -> int:
        """Bytes."""
        return self._log().stat().st_size

    def lose_log_after(self, size: int) -> None:
        """Killed, and started again without what it wrote last, as after a power cut."""
        self.kill()
        os.truncate(self._log(), size)
        self.start()

    def start_afresh(self) -> None:
        """Without a log."""
        self.kill()
        shutil.rmtree(self._folder / "appendonlydir")
        self.start()

    def _log(self) -> Path:
        [log] = self._folder.glob("appendonlydir/*.incr.aof")
        return log


def scripts_of_the_model() -> Mapping[str, Script]:
    """The node's scripts, with another clock."""
    scripts = {}
    for name, script in connection.load_scripts().items():
        assert script.text.count(_TIME) == 1, name
        text = script.text.replace(_TIME, f"local clock = {{0, redis.call('GET', '{_CLOCK}') * 1000}}")
        scripts[name] = Script(text)
    return scripts


class RedisNode(Node):
    """Needs `server`, which runs, and has no other clients."""

    server: ClassVar[ModelServer]
    scripts: ClassVar[Mapping[str, Script]] = scripts_of_the_model()

    async def _make_store(self) -> Any:
        self.maxmemory = 0
        if self.server.log_size() > _LARGEST_LOG:
            self.server.start_afresh()
        self.client = Redis.from_url(self.server.url, protocol=2)
        self.cache = RedisSharedCatalogCache(self.server.url, PREFIX, 20.0, "model")
        state = RedisStateStore(self.server.url, PREFIX, LIMIT, replace(self.times, operation_timeout=20.0))
        with patch.object(connection, "load_scripts", lambda: self.scripts):
            await self.cache.open()
            await state.open()
        await self._set_maxmemory(0)
        await self._empty_store()
        return state

    async def _close(self) -> None:
        await super()._close()
        await self.cache.close()
        await self.client.aclose()

    async def _empty_store(self) -> None:
        await self.client.flushall()
        await self._set_clock()

    async def _pass(self, seconds: float) -> None:
        await super()._pass(seconds)
        await self._set_clock()

    async def _set_clock(self) -> None:
        await self.client.eval(_SET_CLOCK, 1, _CLOCK, round(self.now * 1000))

    async def _snapshot(self) -> Any:
        return self.server.log_size()

    async def _restore(self, snapshot: Any) -> None:
        for connected in (self.state, self.cache, self.client):  # or each connection would fail one call
            await (connected.aclose() if connected is self.client else connected.close())
        self.server.lose_log_after(snapshot)
        await self._set_maxmemory(self.maxmemory)
        await self._set_clock()

    async def _set_full(self, share: float) -> None:
        """With answers of the catalog, which may go when their room is needed, and nothing but what is in use."""
        if not share:
            await self._set_maxmemory(0)
            return
        for (
            script
        ) in self.scripts.values():  # a restarted server has none, and they take room of what it holds
            await self.client.script_load(script.text)
        answers = (_answer(number) for number in range(ANSWERS))
        await self.cache.put([NewAnswer(one.object_id, one, 3600, 7 * 24 * 3600) for one in answers])
        used = (await self.client.info("memory"))["used_memory"]
        await self._set_maxmemory(round(used / share))

    async def _set_maxmemory(self, count: int) -> None:
        self.maxmemory = count
        await self.client.config_set("maxmemory", count)


def _answer(number: int) -> MediaObject:
    source = "https://storage.example.org/storage/api/v1/files/"
    return MediaObject(
        ObjectId(f"{1000 + number}"), 1000, sources=tuple(f"{source}{number}?{one}" for one in range(20))
    )
