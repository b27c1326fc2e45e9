"""A Storage-Squid for tests.

    async with TestSquid(objects, [node.url], workers={7: ["0:1"]}).run() as squid:
        squid.faults = SquidFaults(hang=True, operations=("DataObject",))
        ... squid.url, squid.requests ...

`POST /graphql` is the GraphQL API, `POST /chain` the chain's JSON-RPC over HTTP. `GET|PUT /faults` and
`GET|DELETE /requests` are for tests with whole processes.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import structlog
from graphql import ExecutionResult, execute_sync, parse, validate
from graphql.error import GraphQLError
from websockets.asyncio.server import ServerConnection, serve

from distributor_node.services.demo.objects import DemoObject
from distributor_node.services.demo.squid.data import SquidData, StorageBucket, make_squid_data
from distributor_node.services.demo.squid.resolvers import Root, SquidFaults
from distributor_node.services.demo.squid.sdl import schema_of
from distributor_node.services.demo.wire import ConnectionLost, HttpConnection, MalformedRequest, Request
from distributor_node.shared.waiting import cancel_and_wait

_IDLE_SECONDS = 5.0
_FIRST_REQUEST_SECONDS = 60.0
_FOREVER = float("inf")
_NO_FAULTS = SquidFaults()

logger = structlog.get_logger()


class TestSquid:
    """`data`, `faults` and `height` (blocks processed) may be changed while it runs."""

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
        """See `make_squid_data`."""
        self.data: SquidData = make_squid_data(objects, nodes, buckets, workers, bags_per_bucket)
        self.requests = RequestLog()
        self.height = 1_000_000
        self.port = 0
        self._faults = _NO_FAULTS
        self._matched = 0
        self._host = ""
        self._listener: asyncio.Server | None = None
        self._outage_task: asyncio.Task[None] | None = None
        self._connections: dict[HttpConnection, asyncio.Task[None]] = {}

    @property
    def url(self) -> str:
        """URL of the GraphQL endpoint."""
        return f"http://{self._host}:{self.port}/graphql"

    @property
    def chain_url(self) -> str:
        """URL of the chain's JSON-RPC over HTTP."""
        return f"http://{self._host}:{self.port}/chain"

    @property
    def faults(self) -> SquidFaults:
        return self._faults

    @faults.setter
    def faults(self, faults: SquidFaults) -> None:
        self._faults, self._matched = faults, 0

    @asynccontextmanager
    async def run(self, host: str = "127.0.0.1", port: int = 0) -> AsyncIterator[Self]:
        """Listen for the duration of the context, and then abort every connection. Port 0: any free port."""
        self._host, self.port = host, port
        await self.end_outage()
        try:
            yield self
        finally:
            if self._outage_task is not None:
                await cancel_and_wait(self._outage_task)
            await self.start_outage()

    async def start_outage(self) -> None:
        """Abort all connections, and refuse new ones until `end_outage`."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        connections = dict(self._connections)
        for connection in connections:
            connection.abort()
        await asyncio.gather(*(task for task in connections.values() if task is not asyncio.current_task()))

    async def end_outage(self) -> None:
        """Listen on the same port as before."""
        loop = asyncio.get_running_loop()
        self._listener = await loop.create_server(
            lambda: HttpConnection(self._on_connection), self._host, self.port, backlog=1024
        )
        self.port = self._listener.sockets[0].getsockname()[1]

    def _on_connection(self, connection: HttpConnection) -> None:
        task = asyncio.get_running_loop().create_task(self._serve_connection(connection))
        self._connections[connection] = task
        task.add_done_callback(lambda _: self._connections.pop(connection, None))

    async def _serve_connection(self, connection: HttpConnection) -> None:
        idle_seconds = _FIRST_REQUEST_SECONDS
        try:
            while (request := await connection.read_request(idle_seconds)) is not None:
                await self._serve(request, connection)
                if not request.keep_alive:
                    break
                idle_seconds = _IDLE_SECONDS
        except (ConnectionLost, MalformedRequest) as error:
            logger.debug("squid_connection_lost", reason=str(error))
        connection.close()

    async def _serve(self, request: Request, connection: HttpConnection) -> None:
        match request.method, request.path:
            case "POST", "/graphql":
                await self._handle_query(request, connection)
            case "POST", "/chain":
                await _send(connection, 200, handle_call(request.body, self.height + 2))
            case "GET" | "PUT", "/faults":
                await self._handle_faults(request, connection)
            case "GET" | "DELETE", "/requests":
                if request.method == "DELETE":
                    self.requests.clear()
                await _send(connection, 200, self.requests.to_json())
            case _:
                await _send(connection, 404, {"message": "no such path"})

    async def _handle_faults(self, request: Request, connection: HttpConnection) -> None:
        if request.method == "PUT":
            try:
                self.faults = SquidFaults.from_json(json.loads(request.body))
            except ValueError as error:
                await _send(connection, 400, {"message": str(error)})
                return
        await _send(connection, 200, self.faults.to_json())
        if request.method == "PUT" and self.faults.outage_seconds and self._outage_task is None:
            await connection.flush()
            self._outage_task = asyncio.create_task(
                self._run_outage(self.faults.outage_seconds), name="squid outage"
            )

    async def _run_outage(self, seconds: float) -> None:
        await self.start_outage()
        await asyncio.sleep(seconds)
        await self.end_outage()
        self._outage_task = None

    def _faults_for(self, operation: str) -> SquidFaults:
        faults = self._faults
        if faults.operations and operation not in faults.operations:
            return SquidFaults(schema=faults.schema)
        self._matched += 1
        return SquidFaults(schema=faults.schema) if self._matched <= faults.spare else faults

    async def _handle_query(self, request: Request, connection: HttpConnection) -> None:
        try:
            body = json.loads(request.body)
            operation, text = str(body.get("operationName")), str(body["query"])
            variables = dict(body.get("variables") or {})
        except (ValueError, KeyError, TypeError, AttributeError):
            await _send(
                connection,
                400,
                {"errors": [{"message": "expected operationName, query and variables as JSON"}]},
            )
            return
        record = self.requests.begin(operation, variables)
        try:
            await self._respond(connection, record, text, self._faults_for(operation))
        finally:
            self.requests.end(record)

    async def _respond(
        self, connection: HttpConnection, record: RequestRecord, text: str, faults: SquidFaults
    ) -> None:
        await connection.sleep(_FOREVER if faults.hang else faults.latency)
        if faults.redirect_to is not None:
            await _send(connection, 302, b"", {"Location": faults.redirect_to})
        elif faults.status is not None:
            await _send(connection, faults.status, b"injected fault")
        elif faults.garbage:
            await _send(connection, 200, b"<html>not a response of a squid</html>")
        elif faults.errors:
            failed = {"errors": [{"message": "canceling statement due to statement timeout"}], "data": None}
            await _send(connection, 200, failed)
        else:
            await _send(connection, 200, self._execute(record, text, faults))
        record.status = faults.status or 200

    def _execute(self, record: RequestRecord, text: str, faults: SquidFaults) -> dict[str, Any]:
        schema = schema_of(faults.schema)
        try:
            document = parse(text)
        except GraphQLError as error:
            return {"errors": [error.formatted]}
        if errors := validate(schema, document):
            record.rejected = True
            return {"errors": [error.formatted for error in errors]}
        root = Root(self.data, faults, self.height)
        result = execute_sync(schema, document, root, variable_values=record.variables)
        assert isinstance(result, ExecutionResult)  # noqa: S101
        response: dict[str, Any] = {"data": result.data}
        if result.errors:
            response["errors"] = [error.formatted for error in result.errors]
        if faults.errors_beside_data:
            response["errors"] = [{"message": "some of it is missing"}]
        if faults.huge:
            response["extensions"] = {"padding": "x" * faults.huge}
        return response


async def _send(
    connection: HttpConnection,
    status: int,
    body: bytes | dict[str, Any],
    headers: Mapping[str, str] | None = None,
) -> None:
    kind = "application/json" if isinstance(body, dict) else "text/plain"
    raw = json.dumps(body).encode() if isinstance(body, dict) else body
    lines = [f"HTTP/1.1 {status} Demo", f"Content-Type: {kind}", f"Content-Length: {len(raw)}"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    await connection.write(("\r\n".join(lines) + "\r\n\r\n").encode() + raw)


def handle_call(raw: bytes | str, head: int) -> dict[str, Any]:
    """Return the JSON-RPC response to one call. `head`: the number of the newest block."""
    try:
        call = json.loads(raw)
        method, call_id = call["method"], call.get("id")
    except (ValueError, KeyError, TypeError, AttributeError):
        return {"jsonrpc": "2.0", "id": None, "error": {"code": -32600, "message": "Invalid request"}}
    if method != "chain_getHeader":
        return {"jsonrpc": "2.0", "id": call_id, "error": {"code": -32601, "message": "Method not found"}}
    zeros = "0x" + "0" * 64
    header = {"parentHash": zeros, "number": hex(head), "stateRoot": zeros, "extrinsicsRoot": zeros}
    return {"jsonrpc": "2.0", "id": call_id, "result": header | {"digest": {"logs": []}}}


class TestChain:
    """A websocket server. `head` may be changed while it runs. With `hang` set, it accepts calls and never responds."""

    __test__ = False

    def __init__(self, head: int = 1_000_002) -> None:
        self.head = head
        self.hang = False
        self.calls = 0
        self.url = ""

    @asynccontextmanager
    async def run(self, host: str = "127.0.0.1", port: int = 0) -> AsyncIterator[Self]:
        """Listen for the duration of the context. Port 0: any free port."""
        async with serve(self._serve_connection, host, port, close_timeout=0.5) as server:
            chosen = next(iter(server.sockets)).getsockname()[1]
            self.url = f"ws://{host}:{chosen}"
            yield self

    async def _serve_connection(self, connection: ServerConnection) -> None:
        async for message in connection:
            self.calls += 1
            if self.hang:
                await connection.wait_closed()
                return
            await connection.send(json.dumps(handle_call(message, self.head)))
            await asyncio.sleep(0)


@dataclass(slots=True)
class RequestRecord:
    """One query. Times are POSIX seconds."""

    operation: str
    variables: dict[str, Any]
    started_at: float = field(default_factory=time.time)
    finished_at: float | None = None
    status: int | None = None  # None: there was no response
    rejected: bool = False  # by validation

    @property
    def object_ids(self) -> list[str]:
        """The objects that it asks for, in a query for one or many."""
        if self.operation == "DataObjects":
            return list(self.variables.get("ids") or ())
        return [self.variables["id"]] if "id" in self.variables else []


class RequestLog:
    """The records in order of arrival."""

    def __init__(self) -> None:
        self._records: list[RequestRecord] = []
        self._changed = asyncio.Event()
        self.in_flight = 0
        self.max_in_flight = 0

    def __iter__(self) -> Iterator[RequestRecord]:
        return iter(list(self._records))

    def __len__(self) -> int:
        return len(self._records)

    def begin(self, operation: str, variables: dict[str, Any]) -> RequestRecord:
        record = RequestRecord(operation, variables)
        self._records.append(record)
        self.in_flight += 1
        self.max_in_flight = max(self.max_in_flight, self.in_flight)
        self._notify()
        return record

    def end(self, record: RequestRecord) -> None:
        record.finished_at = time.time()
        self.in_flight -= 1
        self._notify()

    def clear(self) -> None:
        self._records.clear()
        self.max_in_flight = self.in_flight

    def count_for(self, object_id: str) -> int:
        """Return the number of queries for this object, without rejected ones."""
        return sum(object_id in record.object_ids and not record.rejected for record in self._records)

    async def wait_for(self, condition: Callable[[RequestLog], bool], timeout_seconds: float = 60.0) -> None:
        """Wait until the condition holds. It is checked when a query arrives or ends."""
        async with asyncio.timeout(timeout_seconds):
            while not condition(self):
                await self._changed.wait()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def to_json(self) -> dict[str, Any]:
        records = [asdict(record) for record in self._records]
        return {"requests": records, "inFlight": self.in_flight, "maxInFlight": self.max_in_flight}
