"""The connection to Redis: circuit breaker, Lua scripts, time limits, translated errors, subscriptions."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

import structlog
from hiredis import pack_command
from redis import asyncio as aioredis
from redis.asyncio.client import PubSub
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError, RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

from distributor_node.shared.adapters.state_common import AnnouncementQueue
from distributor_node.shared.adapters.state_redis.records import Keys, read_announcement
from distributor_node.shared.domain.errors import ConfigurationError, StateStoreUnavailable
from distributor_node.shared.domain.objects import ObjectId
from distributor_node.shared.domain.space import RECORD_BYTES
from distributor_node.shared.observability.metrics import STATE_STORE_ERRORS
from distributor_node.shared.ports.state_store import Announcement, Topic
from distributor_node.shared.waiting import Backoff, cancel_and_wait, wait_event

OPEN_SECONDS = 0.5
MAX_CONNECTIONS = 32

logger = structlog.get_logger()


class CircuitBreaker:
    """Fails calls at once while the server is unreachable: a thousand misses must not wait for a timeout each.

    It is open for `open_seconds` after each failure to reach the server. Then one call at a time goes through as a
    probe, until one succeeds.
    """

    def __init__(self, open_seconds: float = OPEN_SECONDS) -> None:
        self._open_seconds = open_seconds
        self._cause: BaseException | None = None
        self._open_until = 0.0
        self._probing = False

    def before_call(self) -> bool:
        """Whether the call is a probe. Raises StateStoreUnavailable while open."""
        if self._cause is None:
            return False
        if self._probing or time.monotonic() < self._open_until:
            raise StateStoreUnavailable("state store was unreachable a moment ago") from self._cause
        self._probing = True
        return True

    def after_call(self, probe: bool) -> None:
        """Must follow each `before_call` that returned, also after errors. Otherwise no other probe would be sent."""
        if probe:
            self._probing = False

    def on_success(self) -> None:
        """The server replied."""
        self._cause = None

    def on_failure(self, cause: BaseException) -> bool:
        """The server did not reply. Returns whether the breaker was closed before."""
        was_closed = self._cause is None
        self._cause = cause
        self._open_until = time.monotonic() + self._open_seconds
        return was_closed


# Lua scripts, read from the package

_PRELUDE = "records.lua"


@dataclass(frozen=True, slots=True)
class Script:
    """A complete script."""

    text: str
    digest: str = field(init=False)  # SHA-1 of the text, by which the server knows the script

    def __post_init__(self) -> None:
        digest = hashlib.sha1(self.text.encode(), usedforsecurity=False).hexdigest()
        object.__setattr__(self, "digest", digest)


def load_scripts() -> dict[str, Script]:
    """All scripts, by file name without the suffix."""
    folder = resources.files("distributor_node.shared.adapters.state_redis.scripts")
    prelude = (folder / _PRELUDE).read_text()
    scripts: dict[str, Script] = {}
    for file in folder.iterdir():
        if file.name.endswith(".lua") and file.name != _PRELUDE:
            text = _with_prelude(prelude, file.read_text())
            scripts[file.name.removesuffix(".lua")] = Script(text)
    return scripts


def _with_prelude(prelude: str, body: str) -> str:
    """The first line stays the first where it declares the script's flags."""
    flags, _, rest = body.partition("\n") if body.startswith("#!") else ("", "", body)
    return f"{flags}\n{prelude}\n{rest}" if flags else f"{prelude}\n{rest}"


# Commands and scripts


def make_client(url: str, connect_timeout: float, connections: int = MAX_CONNECTIONS) -> aioredis.Redis:
    """A client that connects when first used.

    No retries: the library's default of ten would exceed every time limit, and repeating a call whose reply was lost
    could apply it twice. No socket timeout: the caller sets one deadline for the whole operation. On cancellation the
    library closes the connection, so that a late reply never reaches the next caller.
    """
    try:
        pool = aioredis.ConnectionPool.from_url(
            url,
            max_connections=connections,
            protocol=2,
            retry=Retry(NoBackoff(), 0),
            socket_timeout=None,
            socket_connect_timeout=connect_timeout,
        )
    except ValueError:
        # The library's message shows a part of the URL, which may be the password.
        raise ConfigurationError(
            "state_store.url: expected redis://, rediss:// or unix:// with a valid port, database and options"
        ) from None
    return aioredis.Redis.from_pool(pool)


class RedisConnection:
    """The only way to the server. Every command and script passes here, and every error is translated and counted here.

    Each call takes at most `timeout` seconds, including the wait for a free connection. Raises StateStoreUnavailable.
    """

    def __init__(self, url: str, prefix: str, timeout: float) -> None:
        self.url = url
        self.keys = Keys(prefix)
        self.timeout = timeout
        self._client = make_client(url, timeout)
        self._free = asyncio.Semaphore(MAX_CONNECTIONS)
        self._breaker = CircuitBreaker()
        self._scripts: dict[str, Script] = {}

    def open(self) -> None:
        self._scripts = load_scripts()

    async def close(self) -> None:
        try:
            await self._client.aclose()
        except (RedisError, OSError) as error:
            # The sockets are closed all the same
            logger.debug("state_store_close_failed", reason=_describe(error))

    async def run(self, script: str, object_id: ObjectId | str, *arguments: str | bytes | int | float) -> Any:
        """Run one script of the scripts folder. `arguments` are its ARGV from the fourth on."""
        return await self.run_on(script, self.keys.all_for(object_id), object_id, *arguments)

    async def run_on(
        self,
        script: str,
        keys: tuple[str, ...],
        object_id: ObjectId | str,
        *arguments: str | bytes | int | float,
    ) -> Any:
        """As `run`, with the given keys."""
        given = (len(keys), *keys, self.keys.channel, RECORD_BYTES, object_id, *arguments)
        body = self._scripts[script]
        return await self._bounded(script, self._evaluate, body, given)

    async def command(self, *arguments: str | bytes | int | float) -> Any:
        """Run one plain command."""
        return await self._bounded(str(arguments[0]).lower(), self._execute, *arguments)

    async def _evaluate(self, script: Script, given: tuple[str | bytes | int | float, ...]) -> Any:
        try:
            return await self._execute("EVALSHA", script.digest, *given)
        except NoScriptError:
            return await self._execute("EVAL", script.text, *given)

    async def _execute(self, *arguments: str | bytes | int | float) -> Any:
        """As the library's `execute_command`, without its telemetry, and with the arguments packed in C.

        A connection on which sending or reading fails is closed, also by a cancellation: see `make_client`.
        """
        pool = self._client.connection_pool
        connection = pool.get_available_connection()  # type: ignore[no-untyped-call]
        try:
            await pool.ensure_connection(connection)
            packed = pack_command(arguments)  # type: ignore[arg-type]  # its stub knows tuples of one
            await connection.send_packed_command(packed)
            return await self._client.parse_response(connection, str(arguments[0]))
        finally:
            await pool.release(connection)

    async def _bounded(self, operation: str, call: Callable[..., Awaitable[Any]], *arguments: Any) -> Any:
        """Apply circuit breaker, time limit and connection limit. Translate errors and count them."""
        try:
            probe = self._breaker.before_call()
            sent_at: float | None = None  # when a connection was free
            try:
                async with asyncio.timeout(self.timeout), self._free:
                    sent_at = time.monotonic()
                    reply = await call(*arguments)
                self._breaker.on_success()
                return reply
            except TimeoutError as error:
                # Calls that wait for a connection behind many others say nothing of the server. It must have had its
                # time to reply
                if sent_at is None or time.monotonic() - sent_at < self.timeout / 2:
                    raise StateStoreUnavailable(
                        f"no connection to the state store was free within {self.timeout:g} s"
                    ) from error
                await self._on_failure(error)
                raise StateStoreUnavailable(f"state store did not reply: {_describe(error)}") from error
            except (RedisConnectionError, RedisTimeoutError, OSError) as error:
                await self._on_failure(error)
                raise StateStoreUnavailable(f"state store did not reply: {_describe(error)}") from error
            except RedisError as error:
                # The server replied with an error: out of memory, read-only replica, failing disk
                self._breaker.on_success()
                raise StateStoreUnavailable(f"state store refused: {_describe(error)}") from error
            finally:
                self._breaker.after_call(probe)
        except StateStoreUnavailable:
            STATE_STORE_ERRORS.labels(operation=operation).inc()
            raise

    async def _on_failure(self, error: BaseException) -> None:
        if self._breaker.on_failure(error):
            await self._drop_idle()

    async def _drop_idle(self) -> None:
        """Close the idle connections. A failover or a router may have left all of them half-open, and each would
        otherwise fail one call."""
        with suppress(RedisError, OSError):
            await self._client.connection_pool.disconnect(inuse_connections=False)


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__} {error}".strip()


_PING_INTERVAL = 2.0
"""Seconds of silence before a ping. As long again without a reply ends the connection."""


@asynccontextmanager
async def listen(url: str, channel: str, timeout: float) -> AsyncIterator[AsyncIterator[Announcement]]:
    """The announcements on a channel.

    Waits up to `timeout` seconds for the subscription, so that no later announcement is missed. If the server is down,
    it goes on without the subscription, which follows when the server is back.
    """
    listener = _Listener(url, channel, timeout)
    task = asyncio.create_task(listener.run(), name="state-store-listener")
    try:
        await wait_event(listener.subscribed, timeout)
        yield listener.queue
    finally:
        await cancel_and_wait(task)
        if not task.cancelled():
            task.result()


class _Listener:
    def __init__(self, url: str, channel: str, timeout: float) -> None:
        self.queue = AnnouncementQueue()
        self.subscribed = asyncio.Event()
        self._url = url
        self._channel = channel
        self._timeout = timeout

    async def run(self) -> None:
        """Subscribe and read, again after every failure, until cancelled."""
        backoff = Backoff()
        while True:
            try:
                await self._listen_once()
            except (RedisError, OSError) as error:
                if self.subscribed.is_set():
                    backoff.reset()
                    self.subscribed.clear()
                    logger.warning("state_store_subscription_lost", reason=f"{type(error).__name__} {error}")
            await backoff.wait()

    async def _listen_once(self) -> None:
        client = make_client(self._url, self._timeout, connections=1)
        pubsub = client.pubsub()
        try:
            async with asyncio.timeout(self._timeout):
                await pubsub.subscribe(self._channel)
            await self._read(pubsub)
        finally:
            await pubsub.aclose()  # type: ignore[no-untyped-call]
            await client.aclose()

    async def _read(self, pubsub: PubSub) -> None:
        pinged = False
        while True:
            async with asyncio.timeout(_PING_INTERVAL + self._timeout):
                message = await pubsub.get_message(timeout=_PING_INTERVAL)
            if message is None:
                if pinged:
                    raise RedisConnectionError("no reply to a ping")
                pinged = True
                async with asyncio.timeout(self._timeout):
                    await pubsub.ping()
                continue
            pinged = False
            self._handle(message)

    def _handle(self, message: dict[str, object]) -> None:
        if message["type"] == "subscribe":
            self.queue.put(Announcement(Topic.SETTINGS_CHANGED))
            self.subscribed.set()
        elif message["type"] == "message" and isinstance(message["data"], bytes):
            announcement = read_announcement(message["data"])
            if announcement is not None:
                self.queue.put(announcement)
