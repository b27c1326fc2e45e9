"""What the squid and the chain say of themselves, for /status: asked in the background, never waited for long."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar
from urllib.parse import urlsplit

import structlog

from shared.adapters.catalogs.joystream import ChainHead, JoystreamCatalog
from shared.domain.errors import CatalogUnavailable
from shared.runtime.adapters import build_chain_head, build_joystream
from shared.settings.model import Settings

POLL_INTERVAL = 10.0
STALE_AFTER = 60.0
"""Seconds that an answer is shown for after the squid or the chain has fallen silent."""
FIRST_READ_TIMEOUT = 0.3
_CLOSING_SECONDS = 5.0

_Value = TypeVar("_Value")

logger = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class SquidAndChainStatus:
    """Block numbers and the squid's version; 0 and "" for what nobody says."""

    chain_head: int = 0
    blocks_processed: int = 0
    version: str = ""


class SquidStatusPoller:
    """`read` costs nothing but memory: at most one question to each every ten seconds, however often it is called."""

    def __init__(
        self,
        squid: JoystreamCatalog,
        chain: ChainHead | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Opened when first asked, closed by `close`. `clock` in seconds."""
        self._squid, self._chain, self._clock = squid, chain, clock
        self._opened = False
        self._height = _Polled[int]("squid_height", clock)
        self._version = _Polled[str]("squid_version", clock)
        self._head = _Polled[int]("chain_head", clock)
        self._next_poll_at = float("-inf")
        self._polling: asyncio.Task[None] | None = None

    async def read(self) -> SquidAndChainStatus:
        """What is known by now; the first readers wait a moment for it."""
        if self._polling is None and self._clock() >= self._next_poll_at:
            self._polling = asyncio.create_task(self._poll(), name="poll-squid-status")
        if self._polling is not None and self._next_poll_at == float("-inf"):
            await asyncio.wait({self._polling}, timeout=FIRST_READ_TIMEOUT)
        return SquidAndChainStatus(
            chain_head=self._head.value() or 0,
            blocks_processed=self._height.value() or 0,
            version=self._version.value() or "",
        )

    async def close(self) -> None:
        if self._polling is not None:
            self._polling.cancel()
            await asyncio.wait({self._polling}, timeout=_CLOSING_SECONDS)
        if self._opened:
            await self._squid.close()

    async def _poll(self) -> None:
        try:
            if not self._opened:
                await self._squid.open()
                self._opened = True
            await asyncio.gather(self._poll_squid(), self._poll_chain())
        finally:
            self._next_poll_at = self._clock() + POLL_INTERVAL
            self._polling = None

    async def _poll_squid(self) -> None:
        try:
            status = await self._squid.squid_status()
        except CatalogUnavailable as error:
            self._height.fail(error)
            return
        self._height.set(status.height)
        self._version.set(status.version)

    async def _poll_chain(self) -> None:
        if self._chain is None:
            return
        try:
            self._head.set(await self._chain.head())
        except CatalogUnavailable as error:
            self._head.fail(error)


class _Polled(Generic[_Value]):
    """The last one to one question, and its age."""

    def __init__(self, name: str, clock: Callable[[], float]) -> None:
        self._name, self._clock = name, clock
        self._value: _Value | None = None
        self._set_at = float("-inf")
        self._failed = False

    def set(self, value: _Value | None) -> None:
        self._failed = False
        if value is not None:
            self._value, self._set_at = value, self._clock()

    def fail(self, error: CatalogUnavailable) -> None:
        """Said once, until there is an answer again."""
        if not self._failed:
            logger.warning("squid_status_unavailable", query=self._name, reason=str(error))
        self._failed = True

    def value(self) -> _Value | None:
        return self._value if self._clock() - self._set_at < STALE_AFTER else None


def make_squid_status_poller(settings: Settings) -> SquidStatusPoller | None:
    """None for catalogs that are no squid."""
    if settings.catalog.kind != "joystream":
        return None
    return SquidStatusPoller(build_joystream(settings), build_chain_head(settings))


def url_without_credentials(url: str) -> str:
    """Without credentials."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()
