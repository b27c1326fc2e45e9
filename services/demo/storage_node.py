"""A storage node for the demo and the tests: the storage node API, with fault injection.

In a test:

    async with StorageNode([bytes_object("7", data)]).run() as node:
        node.faults.add(Fault(cut_after=1000), Match(object_id="7", first=1))
        ... node.url, node.requests ...

Faults do not affect `/faults`, `/requests` and the demo page. Requests for those are not in the request log.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import structlog
import uvloop

from distributor_node.services.demo.answers import (
    Response,
    endpoint_of,
    error_response,
    handle_request,
    json_response,
)
from distributor_node.services.demo.delivery import RequestLog, RequestRecord, ResponseSender
from distributor_node.services.demo.faults import Fault, FaultRegistry
from distributor_node.services.demo.manifest import DEMO_DIRECTORY, write_manifest
from distributor_node.services.demo.objects import BytesContent, DemoObject, demo_objects, held_by_node
from distributor_node.services.demo.wire import ConnectionLost, HttpConnection, MalformedRequest, Request

KEEP_ALIVE_SECONDS = 5.0
_FIRST_REQUEST_SECONDS = 60.0
_CLOSE_TIMEOUT = 60.0
_NO_FAULT = Fault()
_LOGGED_HEADERS = (
    "range", "if-range", "if-match", "if-none-match", "if-modified-since", "if-unmodified-since",
    "accept-encoding", "connection", "host", "user-agent", "x-request-id",
)  # fmt: skip

logger = structlog.get_logger()


class StorageNode:
    """One storage node. `objects` may be changed while it runs."""

    def __init__(
        self,
        objects: Iterable[DemoObject],
        *,
        site: Site | None = None,
        keep_alive_seconds: float = KEEP_ALIVE_SECONDS,
    ) -> None:
        self.objects = held_by_node(objects)
        self.replacements: dict[str, DemoObject] = {}  # what objects become; see Fault.replaces_object
        self.faults = FaultRegistry()
        self.requests = RequestLog()
        self.port = 0
        self._host = ""
        self._site = site
        self._keep_alive_seconds = keep_alive_seconds
        self._connections: dict[HttpConnection, asyncio.Task[None]] = {}
        self._accepted = 0

    @property
    def url(self) -> str:
        """Its URL, such as `http://127.0.0.1:3390`."""
        return f"http://{self._host}:{self.port}"

    @property
    def api_url(self) -> str:
        """The base URL of its API, which is its endpoint in a catalog."""
        return f"{self.url}/api/v1"

    def object_url(self, object_id: str) -> str:
        """The URL of one object on this node."""
        return f"{self.api_url}/files/{object_id}"

    @property
    def open_connections(self) -> int:
        """Number of open connections."""
        return len(self._connections)

    @asynccontextmanager
    async def run(self, host: str = "127.0.0.1", port: int = 0) -> AsyncIterator[Self]:
        """Listen for the duration of the context, and then abort every connection. Port 0: any free port."""
        loop = asyncio.get_running_loop()
        server = await loop.create_server(
            lambda: HttpConnection(self._on_connection), host, port, backlog=1024
        )
        self._host, self.port = host, server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            await self.drop_connections()
            await server.wait_closed()

    async def drop_connections(self) -> None:
        """Abort every open connection, as a crash would."""
        connections = dict(self._connections)
        for connection in connections:
            connection.abort()
        await asyncio.gather(*connections.values())

    def _on_connection(self, connection: HttpConnection) -> None:
        self._accepted += 1
        task = asyncio.get_running_loop().create_task(self._serve_connection(connection, self._accepted))
        self._connections[connection] = task
        task.add_done_callback(lambda _: self._connections.pop(connection, None))

    async def _serve_connection(self, connection: HttpConnection, connection_id: int) -> None:
        """Serve the requests of one connection in turn."""
        idle_seconds, served = _FIRST_REQUEST_SECONDS, 0
        try:
            while (request := await connection.read_request(idle_seconds)) is not None:
                if not await self._serve(request, connection, connection_id, reused=served > 0):
                    break
                idle_seconds, served = self._keep_alive_seconds, served + 1
        except ConnectionLost:
            logger.debug("connection_lost", connection=connection_id)
        except MalformedRequest as error:
            await self._refuse(connection, str(error))
        except OSError:
            logger.exception("object_unreadable", connection=connection_id)
        await self._close_gracefully(connection)

    async def _close_gracefully(self, connection: HttpConnection) -> None:
        """Close the connection. The transport stays until the client has read the rest, for a limited time."""
        connection.close()
        try:
            await connection.sleep(_CLOSE_TIMEOUT)
        except ConnectionLost:
            return
        connection.abort()

    async def _refuse(self, connection: HttpConnection, reason: str) -> None:
        record = RequestRecord("", "", 0, time.time())
        try:
            await ResponseSender(
                connection, error_response(400, "bad_request", reason), _NO_FAULT, record
            ).send(keep_alive=False)
        except ConnectionLost:
            logger.debug("connection_lost", reason=reason)

    async def _serve(
        self, request: Request, connection: HttpConnection, connection_id: int, *, reused: bool
    ) -> bool:
        """Serve one request. Returns whether the connection can be reused."""
        response = handle_control(request, self.faults, self.requests, self._site)
        if response is not None:
            unlogged = RequestRecord(request.method, request.target, connection_id, time.time())
            return await ResponseSender(connection, response, _NO_FAULT, unlogged).send(request.keep_alive)
        logged = {name: request.headers[name] for name in _LOGGED_HEADERS if name in request.headers}
        record = RequestRecord(request.method, request.target, connection_id, time.time(), logged)
        self.requests.append(record)
        try:
            return await self._respond(request, connection, record, reused=reused)
        except (ConnectionLost, OSError):
            record.aborted = True
            raise
        finally:
            record.finished_at = time.time()
            self.requests.notify()

    async def _respond(
        self, request: Request, connection: HttpConnection, record: RequestRecord, *, reused: bool
    ) -> bool:
        endpoint, object_id = endpoint_of(request)
        fault = _NO_FAULT
        if endpoint is not None:
            ranged = "range" in request.headers
            fault = self.faults.fault_for(request.method, endpoint, object_id, ranged)
        if fault.close_reused_connection and reused:
            record.aborted = True
            connection.abort()
            return False
        response: Response = handle_request(request, self.objects)
        sender = ResponseSender(connection, response, fault, record, self.requests.notify)
        if fault.replaces_object and object_id in self.replacements:
            # The response goes on with the bytes it began with. Whatever comes after it sees the new object.
            self.objects[object_id] = self.replacements[object_id]
        return await sender.send(request.keep_alive)


# Beside its API, the node serves the faults, the request log and the demo page.


class StoryTeller(Protocol):
    """What the page shows and does with one film, where the demo runs the distributor node, too."""

    def document(self) -> dict[str, Any]:
        """Return the document `/story.json`."""

    def begin(self, scene: str) -> bool:
        """Begin a scene. False: there is none of this name."""


@dataclass(frozen=True, slots=True)
class Site:
    """The demo page, and the files beside it."""

    page: Path  # its file
    node_url: str  # of the distributor node from which it loads all media
    objects: tuple[DemoObject, ...]
    dashboard_url: str = ""  # of the node's own page; empty: there is none
    story: StoryTeller | None = None

    def description(self) -> dict[str, Any]:
        """Return the document `/demo.json`: the node, and every object of the manifest with the id of its subtitles."""
        return {
            "node_url": self.node_url.rstrip("/"),
            "dashboard_url": self.dashboard_url,
            "has_story": self.story is not None,
            "objects": list(_described(self.objects)),
        }


def _described(objects: Iterable[DemoObject]) -> Iterable[dict[str, Any]]:
    known = list(objects)
    subtitles = {item.name: item.object_id for item in known if item.media_type == "text/vtt"}
    for item in known:
        entry = {
            "id": item.object_id,
            "name": item.name,
            "size": item.size,
            "media_type": item.media_type,
            "bucket": item.bucket,
            "accepted": item.held,
        }
        if item.media_type.startswith("video/") and item.name in subtitles:
            entry["subtitles"] = subtitles[item.name]
        yield entry


def handle_control(
    request: Request, faults: FaultRegistry, log: RequestLog, site: Site | None
) -> Response | None:
    """Return the response for a control endpoint or the page. None: the path is neither."""
    if request.path == "/faults":
        return _faults(request, faults)
    if request.path == "/requests":
        return _requests(request, log)
    if site is None:
        return None
    if site.story is not None and request.path.startswith("/story/"):
        # PUT, which a page of another origin cannot send without a preflight, and none is answered.
        if request.method != "PUT":
            return error_response(405, "method_not_allowed", "PUT")
        if not site.story.begin(request.path.removeprefix("/story/")):
            return error_response(404, "no_such_scene", "no such scene, or the node has not started")
        return json_response(200, site.story.document())
    if request.path in ("/", "/index.html", "/demo.json", "/worker.js", "/story.json"):
        if request.method not in ("GET", "HEAD"):
            return error_response(405, "method_not_allowed", "GET or HEAD")
        return _read(request.path, site)
    return None


def _read(path: str, site: Site) -> Response:
    match path:
        case "/demo.json":
            return json_response(200, site.description())
        case "/story.json":
            return Response(404) if site.story is None else json_response(200, site.story.document())
        case "/worker.js":
            return _file(site.page.with_name("worker.js"), "text/javascript")
    return _file(site.page, "text/html")


def _faults(request: Request, faults: FaultRegistry) -> Response:
    if request.method == "PUT":
        try:
            faults.replace_from_json(json.loads(request.body))
        except ValueError as error:
            return error_response(400, "invalid_faults", str(error))
    elif request.method != "GET":
        return error_response(405, "method_not_allowed", "GET or PUT")
    return json_response(200, faults.to_json())


def _requests(request: Request, log: RequestLog) -> Response:
    if request.method == "DELETE":
        log.clear()
    elif request.method != "GET":
        return error_response(405, "method_not_allowed", "GET or DELETE")
    return json_response(200, log.to_json())


def _file(path: Path, media_type: str) -> Response:
    text = path.read_bytes()
    headers = (("Content-Type", f"{media_type}; charset=utf-8"), ("Cache-Control", "no-cache"))
    return Response(200, headers, BytesContent(text), 0, len(text))


# The command `python -m distributor_node.services.demo.storage_node`.


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and serve."""
    options = _parser().parse_args(arguments)
    # Logs go to standard error: standard output is for --print-port.
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(file=sys.stderr))
    uvloop.run(serve(options))


async def serve(options: argparse.Namespace) -> None:
    """Serve until SIGINT or SIGTERM."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    objects = demo_objects(options.media)
    site = Site(options.page, options.node_url, tuple(objects))
    async with StorageNode(objects, site=site).run(options.host, options.port) as node:
        if options.write_manifest is not None:
            public_url = (options.public_url or node.url).rstrip("/")
            write_manifest(options.write_manifest, objects, f"{public_url}/api/v1/files/")
        if options.print_port:
            print(node.port, flush=True)
        logger.info(
            "storage_node_listening", url=node.url, objects=len(node.objects), node_url=options.node_url
        )
        await stop.wait()
    logger.info("storage_node_stopped")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="distributor_node.services.demo.storage_node",
        description="A storage node with the demo's objects and page. PUT /faults injects faults.",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=3390, help="0: any free port (default: %(default)s)")
    parser.add_argument(
        "--media", type=Path, default=DEMO_DIRECTORY / "media", help="directory of <id>-<name>.<ext>"
    )
    parser.add_argument(
        "--page", type=Path, default=DEMO_DIRECTORY / "page" / "index.html", help="the demo page"
    )
    parser.add_argument(
        "--node-url",
        default="http://127.0.0.1:3334",
        help="the distributor node that the page uses (default: %(default)s)",
    )
    parser.add_argument(
        "--write-manifest", type=Path, metavar="FILE", help="write a manifest with this node's port"
    )
    parser.add_argument(
        "--public-url",
        help="URL of this process in the manifest (default: host and port)",
    )
    parser.add_argument(
        "--print-port", action="store_true", help="print the port on standard output once listening"
    )
    return parser


if __name__ == "__main__":
    main()
