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

ASKED_EVERY = 10.0
BELIEVED = 60.0
"""Seconds that an answer is shown for after the squid or the chain has fallen silent."""
_PATIENCE = 0.3
_CLOSING_SECONDS = 5.0

_Value = TypeVar("_Value")

logger = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class QueryNodeStatus:
    """Block numbers and the squid's version; 0 and "" for what nobody says."""

    chain_head: int = 0
    blocks_processed: int = 0
    version: str = ""


class QueryNode:
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
        self._height = _Answer[int]("squid_height", clock)
        self._version = _Answer[str]("squid_version", clock)
        self._head = _Answer[int]("chain_head", clock)
        self._ask_at = float("-inf")
        self._asking: asyncio.Task[None] | None = None

    async def read(self) -> QueryNodeStatus:
        """What is known by now; the first readers wait a moment for it."""
        if self._asking is None and self._clock() >= self._ask_at:
            self._asking = asyncio.create_task(self._ask(), name="ask-query-node")
        if self._asking is not None and self._ask_at == float("-inf"):
            await asyncio.wait({self._asking}, timeout=_PATIENCE)
        return QueryNodeStatus(
            chain_head=self._head.current() or 0,
            blocks_processed=self._height.current() or 0,
            version=self._version.current() or "",
        )

    async def close(self) -> None:
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.wait({self._asking}, timeout=_CLOSING_SECONDS)
        if self._opened:
            await self._squid.close()

    async def _ask(self) -> None:
        try:
            if not self._opened:
                await self._squid.open()
                self._opened = True
            await asyncio.gather(self._ask_squid(), self._ask_chain())
        finally:
            self._ask_at = self._clock() + ASKED_EVERY
            self._asking = None

    async def _ask_squid(self) -> None:
        try:
            status = await self._squid.squid_status()
        except CatalogUnavailable as error:
            self._height.missed(error)
            return
        self._height.given(status.height)
        self._version.given(status.version)

    async def _ask_chain(self) -> None:
        if self._chain is None:
            return
        try:
            self._head.given(await self._chain.head())
        except CatalogUnavailable as error:
            self._head.missed(error)


class _Answer(Generic[_Value]):
    """The last one to one question, and its age."""

    def __init__(self, name: str, clock: Callable[[], float]) -> None:
        self._name, self._clock = name, clock
        self._value: _Value | None = None
        self._given_at = float("-inf")
        self._missed = False

    def given(self, value: _Value | None) -> None:
        self._missed = False
        if value is not None:
            self._value, self._given_at = value, self._clock()

    def missed(self, error: CatalogUnavailable) -> None:
        """Said once, until there is an answer again."""
        if not self._missed:
            logger.warning("query_node_silent", question=self._name, reason=str(error))
        self._missed = True

    def current(self) -> _Value | None:
        return self._value if self._clock() - self._given_at < BELIEVED else None


def make_query_node(settings: Settings) -> QueryNode | None:
    """None for catalogs that are no squid."""
    if settings.catalog.kind != "joystream":
        return None
    return QueryNode(build_joystream(settings), build_chain_head(settings))


def shown_url(url: str) -> str:
    """Without credentials."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()
