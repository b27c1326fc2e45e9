"""A storage node for the demo and for every test: the storage node API, served rightly or as wrongly as told.

In a test:

    async with StorageNode([bytes_object("7", data)]).run() as node:
        node.knobs.add(Behaviour(cut_after=1000), Match(object_id="7", first=1))
        ... node.url, node.requests ...

Knobs never touch `/knobs`, `/requests` and the page, and requests for those are not in the log.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Self

import structlog

from services.demo.answers import Answer, answer_request, endpoint_of, error_answer
from services.demo.control import Site, answer_control
from services.demo.delivery import Delivery
from services.demo.knob_panel import KnobPanel
from services.demo.knobs import Behaviour
from services.demo.objects import DemoObject, held_by_node
from services.demo.request_log import RequestLog, RequestRecord
from services.demo.wire import ConnectionLost, MalformedRequest, Request, Wire

KEEP_ALIVE_SECONDS = 5.0
_FIRST_REQUEST_SECONDS = 60.0
_FAREWELL_SECONDS = 60.0
_GOOD = Behaviour()
_LOGGED_HEADERS = (
    "range", "if-range", "if-match", "if-none-match", "if-modified-since", "if-unmodified-since",
    "accept-encoding", "connection", "host", "user-agent", "x-request-id",
)  # fmt: skip

logger = structlog.get_logger()


class StorageNode:
    """One storage node; `objects` may be changed while it runs."""

    def __init__(
        self,
        objects: Iterable[DemoObject],
        *,
        site: Site | None = None,
        keep_alive_seconds: float = KEEP_ALIVE_SECONDS,
    ) -> None:
        self.objects = held_by_node(objects)
        self.knobs = KnobPanel()
        self.requests = RequestLog()
        self.port = 0
        self._host = ""
        self._site = site
        self._keep_alive_seconds = keep_alive_seconds
        self._conversations: dict[Wire, asyncio.Task[None]] = {}
        self._accepted = 0

    @property
    def url(self) -> str:
        """Where the node listens, such as `http://127.0.0.1:3390`."""
        return f"http://{self._host}:{self.port}"

    @property
    def api_url(self) -> str:
        """The base of the storage node API; a catalog knows a storage node by this."""
        return f"{self.url}/api/v1"

    def object_url(self, object_id: str) -> str:
        """The URL of one object on this node."""
        return f"{self.api_url}/files/{object_id}"

    @property
    def open_connections(self) -> int:
        """Connections that clients hold open now."""
        return len(self._conversations)

    @asynccontextmanager
    async def run(self, host: str = "127.0.0.1", port: int = 0) -> AsyncIterator[Self]:
        """Listen while the context lasts; port 0 takes a free one. At the end every connection is cut."""
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: Wire(self._welcome), host, port, backlog=1024)
        self._host, self.port = host, server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            await self.drop_connections()
            await server.wait_closed()

    async def drop_connections(self) -> None:
        """Cut every open connection, as a crash would."""
        conversations = dict(self._conversations)
        for wire in conversations:
            wire.abort()
        await asyncio.gather(*conversations.values())

    def _welcome(self, wire: Wire) -> None:
        self._accepted += 1
        task = asyncio.get_running_loop().create_task(self._converse(wire, self._accepted))
        self._conversations[wire] = task
        task.add_done_callback(lambda _: self._conversations.pop(wire, None))

    async def _converse(self, wire: Wire, connection: int) -> None:
        """Serve the requests of one connection, one after the other."""
        idle_seconds, served = _FIRST_REQUEST_SECONDS, 0
        try:
            while (request := await wire.read_request(idle_seconds)) is not None:
                if not await self._serve(request, wire, connection, reused=served > 0):
                    break
                idle_seconds, served = self._keep_alive_seconds, served + 1
        except ConnectionLost:
            logger.debug("connection_lost", connection=connection)
        except MalformedRequest as error:
            await self._refuse(wire, str(error))
        except OSError:
            logger.exception("object_unreadable", connection=connection)
        await self._farewell(wire)

    async def _farewell(self, wire: Wire) -> None:
        """Close in order: a closed transport lives on until the client has read what is left, but not for ever."""
        wire.close()
        try:
            await wire.sleep(_FAREWELL_SECONDS)
        except ConnectionLost:
            return
        wire.abort()

    async def _refuse(self, wire: Wire, reason: str) -> None:
        record = RequestRecord("", "", 0, time.time())
        try:
            await Delivery(wire, error_answer(400, "bad_request", reason), _GOOD, record).send(
                keep_alive=False
            )
        except ConnectionLost:
            logger.debug("connection_lost", reason=reason)

    async def _serve(self, request: Request, wire: Wire, connection: int, *, reused: bool) -> bool:
        """Answer one request; whether the connection can serve another."""
        answer = answer_control(request, self.knobs, self.requests, self._site)
        if answer is not None:
            unlogged = RequestRecord(request.method, request.target, connection, time.time())
            return await Delivery(wire, answer, _GOOD, unlogged).send(request.keep_alive)
        logged = {name: request.headers[name] for name in _LOGGED_HEADERS if name in request.headers}
        record = RequestRecord(request.method, request.target, connection, time.time(), logged)
        self.requests.append(record)
        try:
            return await self._answer(request, wire, record, reused=reused)
        except (ConnectionLost, OSError):
            record.aborted = True
            raise
        finally:
            record.finished_at = time.time()
            self.requests.notify()

    async def _answer(self, request: Request, wire: Wire, record: RequestRecord, *, reused: bool) -> bool:
        endpoint, object_id = endpoint_of(request)
        behaviour = _GOOD
        if endpoint is not None:
            ranged = "range" in request.headers
            behaviour = self.knobs.behaviour_for(request.method, endpoint, object_id, ranged)
        if behaviour.close_reused_connection and reused:
            record.aborted = True
            wire.abort()
            return False
        answer: Answer = answer_request(request, self.objects)
        return await Delivery(wire, answer, behaviour, record, self.requests.notify).send(request.keep_alive)


if __name__ == "__main__":
    from services.demo.cli import main

    main()
