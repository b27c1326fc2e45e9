"""A Storage-Squid to test against.

    async with TestSquid(objects, [node.url], workers={7: ["0:1"]}).run() as squid:
        squid.knobs = SquidKnobs(hang=True, operations=("DataObject",))
        ... squid.url, squid.questions ...

`POST /graphql` asks, `GET|PUT /knobs` and `GET|DELETE /questions` are for tests of whole processes; `POST /chain` is
the chain's JSON-RPC over HTTP.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Self

import structlog
from graphql import ExecutionResult, execute_sync, parse, validate
from graphql.error import GraphQLError

from services.demo.objects import DemoObject
from services.demo.squid.chain import answer_call
from services.demo.squid.knobs import SquidKnobs
from services.demo.squid.question_log import QuestionLog, QuestionRecord
from services.demo.squid.resolvers import Root
from services.demo.squid.sdl import schema_of
from services.demo.squid.world import StorageBucket, World, make_world
from services.demo.wire import ConnectionLost, MalformedRequest, Request, Wire

_IDLE_SECONDS = 5.0
_FIRST_REQUEST_SECONDS = 60.0
_FOREVER = float("inf")
_WELL = SquidKnobs()

logger = structlog.get_logger()


class TestSquid:
    """`world`, `knobs` and `height` (blocks processed) may be changed while it runs."""

    __test__ = False

    def __init__(
        self,
        objects: Iterable[DemoObject],
        nodes: Sequence[str | StorageBucket] = (),
        *,
        buckets: Iterable[str] = (),
        workers: Mapping[int, Sequence[str]] | None = None,
        bags_per_bucket: int = 1,
    ) -> None:
        """See `make_world`."""
        self.world: World = make_world(objects, nodes, buckets, workers, bags_per_bucket)
        self.questions = QuestionLog()
        self.height = 1_000_000
        self.port = 0
        self._knobs = _WELL
        self._fitting = 0
        self._host = ""
        self._listener: asyncio.Server | None = None
        self._return: asyncio.Task[None] | None = None
        self._conversations: dict[Wire, asyncio.Task[None]] = {}

    @property
    def url(self) -> str:
        """Of the GraphQL endpoint."""
        return f"http://{self._host}:{self.port}/graphql"

    @property
    def chain_url(self) -> str:
        """Of the chain's JSON-RPC over HTTP."""
        return f"http://{self._host}:{self.port}/chain"

    @property
    def knobs(self) -> SquidKnobs:
        return self._knobs

    @knobs.setter
    def knobs(self, knobs: SquidKnobs) -> None:
        self._knobs, self._fitting = knobs, 0

    @asynccontextmanager
    async def run(self, host: str = "127.0.0.1", port: int = 0) -> AsyncIterator[Self]:
        """Listen while the context lasts; port 0 takes a free one. At the end every connection is cut."""
        self._host, self.port = host, port
        await self.come_back()
        try:
            yield self
        finally:
            if self._return is not None:
                self._return.cancel()
                await asyncio.wait({self._return})
            await self.go_away()

    async def go_away(self) -> None:
        """An outage: connections are cut and refused until `come_back`."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        conversations = dict(self._conversations)
        for wire in conversations:
            wire.abort()
        await asyncio.gather(*(task for task in conversations.values() if task is not asyncio.current_task()))

    async def come_back(self) -> None:
        """Listen, on the same port as before."""
        loop = asyncio.get_running_loop()
        self._listener = await loop.create_server(
            lambda: Wire(self._welcome), self._host, self.port, backlog=1024
        )
        self.port = self._listener.sockets[0].getsockname()[1]

    def _welcome(self, wire: Wire) -> None:
        task = asyncio.get_running_loop().create_task(self._converse(wire))
        self._conversations[wire] = task
        task.add_done_callback(lambda _: self._conversations.pop(wire, None))

    async def _converse(self, wire: Wire) -> None:
        idle_seconds = _FIRST_REQUEST_SECONDS
        try:
            while (request := await wire.read_request(idle_seconds)) is not None:
                await self._serve(request, wire)
                if not request.keep_alive:
                    break
                idle_seconds = _IDLE_SECONDS
        except (ConnectionLost, MalformedRequest) as error:
            logger.debug("squid_connection_lost", reason=str(error))
        wire.close()

    async def _serve(self, request: Request, wire: Wire) -> None:
        match request.method, request.path:
            case "POST", "/graphql":
                await self._answer_question(request, wire)
            case "POST", "/chain":
                await _send(wire, 200, answer_call(request.body, self.height + 2))
            case "GET" | "PUT", "/knobs":
                await self._turn_knobs(request, wire)
            case "GET" | "DELETE", "/questions":
                if request.method == "DELETE":
                    self.questions.clear()
                await _send(wire, 200, self.questions.to_json())
            case _:
                await _send(wire, 404, {"message": "no such path"})

    async def _turn_knobs(self, request: Request, wire: Wire) -> None:
        if request.method == "PUT":
            try:
                self.knobs = SquidKnobs.from_json(json.loads(request.body))
            except ValueError as error:
                await _send(wire, 400, {"message": str(error)})
                return
        await _send(wire, 200, self.knobs.to_json())
        if request.method == "PUT" and self.knobs.outage_seconds and self._return is None:
            await wire.flush()
            self._return = asyncio.create_task(self._outage(self.knobs.outage_seconds), name="squid outage")

    async def _outage(self, seconds: float) -> None:
        await self.go_away()
        await asyncio.sleep(seconds)
        await self.come_back()
        self._return = None

    def _knobs_for(self, operation: str) -> SquidKnobs:
        knobs = self._knobs
        if knobs.operations and operation not in knobs.operations:
            return SquidKnobs(schema=knobs.schema)
        self._fitting += 1
        return SquidKnobs(schema=knobs.schema) if self._fitting <= knobs.spare else knobs

    async def _answer_question(self, request: Request, wire: Wire) -> None:
        try:
            body = json.loads(request.body)
            operation, text = str(body.get("operationName")), str(body["query"])
            variables = dict(body.get("variables") or {})
        except (ValueError, KeyError, TypeError, AttributeError):
            await _send(
                wire, 400, {"errors": [{"message": "want operationName, query and variables as JSON"}]}
            )
            return
        record = self.questions.begin(operation, variables)
        try:
            await self._answer(wire, record, text, self._knobs_for(operation))
        finally:
            self.questions.end(record)

    async def _answer(self, wire: Wire, record: QuestionRecord, text: str, knobs: SquidKnobs) -> None:
        await wire.sleep(_FOREVER if knobs.hang else knobs.latency)
        if knobs.redirect_to is not None:
            await _send(wire, 302, b"", {"Location": knobs.redirect_to})
        elif knobs.status is not None:
            await _send(wire, knobs.status, b"the demo squid was told to fail")
        elif knobs.garbage:
            await _send(wire, 200, b"<html>no answer of a squid</html>")
        elif knobs.errors:
            failed = {"errors": [{"message": "canceling statement due to statement timeout"}], "data": None}
            await _send(wire, 200, failed)
        else:
            await _send(wire, 200, self._answer_well(record, text, knobs))
        record.status = knobs.status or 200

    def _answer_well(self, record: QuestionRecord, text: str, knobs: SquidKnobs) -> dict[str, Any]:
        schema = schema_of(knobs.schema)
        try:
            document = parse(text)
        except GraphQLError as error:
            return {"errors": [error.formatted]}
        if refusals := validate(schema, document):
            record.refused = True
            return {"errors": [refusal.formatted for refusal in refusals]}
        root = Root(self.world, knobs, self.height)
        result = execute_sync(schema, document, root, variable_values=record.variables)
        assert isinstance(result, ExecutionResult)  # noqa: S101
        answer: dict[str, Any] = {"data": result.data}
        if result.errors:
            answer["errors"] = [error.formatted for error in result.errors]
        if knobs.errors_beside_data:
            answer["errors"] = [{"message": "some of it is missing"}]
        if knobs.huge:
            answer["extensions"] = {"padding": "x" * knobs.huge}
        return answer


async def _send(
    wire: Wire, status: int, body: bytes | dict[str, Any], headers: Mapping[str, str] | None = None
) -> None:
    kind = "application/json" if isinstance(body, dict) else "text/plain"
    raw = json.dumps(body).encode() if isinstance(body, dict) else body
    lines = [f"HTTP/1.1 {status} Demo", f"Content-Type: {kind}", f"Content-Length: {len(raw)}"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    await wire.write(("\r\n".join(lines) + "\r\n\r\n").encode() + raw)
