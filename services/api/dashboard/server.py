"""The HTTP server of the node's page: files, one stream of events for all pages, and the search by object id.

It reads and changes nothing. One snapshot is made each second while a page is open, and sent to all of them. All API
processes of a machine try to listen on the port; one succeeds, and another takes over when that one ends.
"""

from __future__ import annotations

import asyncio
import base64
import hmac
import json
import re
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from importlib.resources import files
from ipaddress import ip_address
from urllib.parse import parse_qs, unquote

import structlog

from distributor_node.services.api.dashboard.feed import Feed
from distributor_node.shared.domain.errors import InvalidInput, StateStoreUnavailable
from distributor_node.shared.domain.objects import ObjectId
from distributor_node.shared.observability.metrics import DASHBOARD_PAGES, DASHBOARD_SNAPSHOT
from distributor_node.shared.observability.probe_server import HttpConnections, http_response
from distributor_node.shared.ports.state_store import ReportStore
from distributor_node.shared.runtime.process_reports import WATCH_SECONDS
from distributor_node.shared.settings.model import DashboardSettings
from distributor_node.shared.waiting import background

SNAPSHOT_INTERVAL = 1.0
"""Seconds from the end of one snapshot to the next one, if it took little time."""
_MAX_SNAPSHOT_INTERVAL = 5.0
_REST = 20
"""Times as long as a snapshot kept the event loop busy until the next one, within these limits."""
MAX_PAGES = 100
_MAX_CONNECTIONS = 2 * MAX_PAGES
_MAX_BUFFERED = 1024 * 1024
"""Bytes that a page may be behind. Further snapshots are left out until it has caught up."""
_EXPLAIN_TIMEOUT = 30.0
_BIND_INTERVAL = 1.0
_DRAIN_TIMEOUT = 30.0

_FILES = {
    "/": ("page.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = (
    f"Content-Security-Policy: {_POLICY}\r\nX-Content-Type-Options: nosniff\r\nReferrer-Policy: no-referrer\r\n"
    "Cross-Origin-Resource-Policy: same-origin\r\nX-Frame-Options: DENY\r\n"
)
_LOCAL_NAME = re.compile(r"(.*\.)?localhost")

logger = structlog.get_logger()


class DashboardServer:
    """Run `run` as a task, and cancel it to stop."""

    def __init__(
        self, settings: DashboardSettings, feed: Feed, store: ReportStore, on_open: Callable[[], None]
    ) -> None:
        """`on_open` is called when a page is opened, and with each snapshot: this process reports at once then."""
        self._settings, self._feed, self._store, self._on_open = settings, feed, store, on_open
        self._files = {
            path: (media_type, files(__package__).joinpath(name).read_bytes())
            for path, (name, media_type) in _FILES.items()
        }
        self._pages: set[asyncio.StreamWriter] = set()
        self._connections = HttpConnections(self._serve, _MAX_CONNECTIONS)
        self._opened = asyncio.Event()
        self.port: int | None = None
        """The port it listens on. None: another process holds it."""

    async def run(self) -> None:
        """Listen as soon as the port is free, and serve until cancelled."""
        server = await self._listen()
        self.port = server.sockets[0].getsockname()[1]
        logger.info("dashboard_opened", host=self._settings.host, port=self.port)
        try:
            async with background(self._feed_pages(), "dashboard-feed") as feeding:
                await feeding  # ends with an error alone
        finally:
            server.close()
            await self._connections.close()
            await self._feed.close()

    async def _listen(self) -> asyncio.Server:
        logged = False
        while True:
            try:
                return await self._connections.listen(self._settings.host, self._settings.port)
            except (OSError, UnicodeError) as error:
                if not logged:
                    # Most likely another API process of this machine, which is as it should be.
                    logged = True
                    logger.info("dashboard_port_taken", port=self._settings.port, reason=str(error))
            await asyncio.sleep(_BIND_INTERVAL)

    # Pages

    async def _feed_pages(self) -> None:
        """Send a snapshot each second, and the history whenever it has grown, while there are pages."""
        history_ends = -1.0
        while True:
            if not self._pages:
                self._opened.clear()
                await self._opened.wait()
                history_ends = -1.0
            self._on_open()
            started = time.thread_time()
            try:
                await self._announce()
                with DASHBOARD_SNAPSHOT.time():
                    snapshot = await self._feed.snapshot()
                self._send_all("snapshot", snapshot)
            except Exception:  # a mistake in a view must not end what is viewed
                logger.exception("dashboard_snapshot_failed")
            if self._feed.history_ends != history_ends:
                history_ends = self._feed.history_ends
                self._send_all("history", self._feed.history())
            # Of a node with very long queues, or a busy one, the page shows less often: it must not be in the way.
            busy = time.thread_time() - started
            await asyncio.sleep(min(max(SNAPSHOT_INTERVAL, _REST * busy), _MAX_SNAPSHOT_INTERVAL))

    async def _announce(self) -> None:
        """Tell all processes that a page is open."""
        try:
            await self._store.watch_reports(WATCH_SECONDS)
        except StateStoreUnavailable as error:
            logger.debug("page_not_announced", reason=str(error))

    def _send_all(self, event: str, content: object) -> None:
        message = _event(event, content)
        for page in self._pages:
            if page.transport.get_write_buffer_size() < _MAX_BUFFERED:
                page.write(message)

    async def _serve_page(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Keep the stream open until the page closes it."""
        writer.write(
            f"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nCache-Control: no-store\r\n{_HEADERS}"
            "Connection: close\r\n\r\n".encode()
        )
        writer.write(b"retry: 1000\n\n" + _event("history", self._feed.history()))
        self._pages.add(writer)
        self._opened.set()
        try:
            with DASHBOARD_PAGES.track_inprogress():
                while await reader.read(1024):
                    continue
        finally:
            self._pages.discard(writer)

    # Requests

    async def _serve(self, text: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = _Head(text.decode("latin-1"))
        rejection = self._rejection(head)
        if rejection is None and head.path == "/events" and head.method == "GET":
            if len(self._pages) < MAX_PAGES:
                await self._serve_page(reader, writer)
                return
            rejection = _response(503, "text/plain", b"too many pages are open\n")
        response = rejection or await self._resource(head)
        writer.write(response)
        async with asyncio.timeout(_DRAIN_TIMEOUT):
            await writer.drain()

    def _rejection(self, head: _Head) -> bytes | None:
        """The response to a request that is not answered, or None."""
        if head.method not in {"GET", "HEAD"}:
            return _response(405, "text/plain", b"GET only\n", extra="Allow: GET, HEAD\r\n")
        password = self._settings.password
        if password is None:
            if _is_local_or_address(head.header("host")):
                return None
            text = b"Without dashboard.password this page answers only to localhost and to IP addresses.\n"
            return _response(421, "text/plain", text)
        expected = f"{self._settings.user}:{password.get_secret_value()}"
        if hmac.compare_digest(_credentials(head.header("authorization")), expected.encode()):
            return None
        challenge = 'WWW-Authenticate: Basic realm="distributor node", charset="UTF-8"\r\n'
        return _response(401, "text/plain", b"not authorised\n", extra=challenge)

    async def _resource(self, head: _Head) -> bytes:
        with_body = head.method == "GET"
        if head.path in self._files:
            media_type, body = self._files[head.path]
            return _response(200, media_type, body, with_body=with_body)
        if head.path == "/snapshot.json":
            self._on_open()
            await self._announce()
            return await self._as_json(self._feed.snapshot, with_body=with_body)
        if head.path == "/history.json":
            return _json_response(200, self._feed.history(), with_body=with_body)
        if head.path == "/explain.json":
            try:
                path, _, query = head.query.get("id", "").strip().partition("?")
                object_id = ObjectId.parse_text(path, query)
                return await self._as_json(lambda: self._feed.explain(object_id), with_body=with_body)
            except InvalidInput as error:
                return _json_response(400, {"message": str(error)}, with_body=with_body)
        return _response(404, "text/plain", b"not found\n", with_body=with_body)

    async def _as_json(self, make: Callable[[], Awaitable[object]], *, with_body: bool) -> bytes:
        try:
            async with asyncio.timeout(_EXPLAIN_TIMEOUT):
                return _json_response(200, await make(), with_body=with_body)
        except (StateStoreUnavailable, TimeoutError) as error:
            message = {"message": str(error) or "no answer in time"}
            return _json_response(503, message, with_body=with_body)


class _Head:
    """A request's head. What cannot be parsed has no method."""

    def __init__(self, text: str) -> None:
        line, *fields = text.split("\r\n")
        self.method, _, rest = line.partition(" ")
        target, _, version = rest.partition(" ")
        if not version.startswith("HTTP/1."):
            self.method = ""
        self.path, _, query = target.partition("?")
        self.query = (
            {name: values[0] for name, values in parse_qs(query, max_num_fields=10).items()} if query else {}
        )
        self._fields = [field.partition(":") for field in fields]

    def header(self, name: str) -> str:
        """The first line of this header, or nothing."""
        return next((value.strip() for field, _, value in self._fields if field.lower() == name), "")


def _is_local_or_address(host: str) -> bool:
    """Whether a Host header cannot be the name of a site that has made its name point here (DNS rebinding)."""
    name = host[1:].partition("]")[0] if host.startswith("[") else host.rpartition(":")[0] or host
    if _LOCAL_NAME.fullmatch(name.lower()):
        return True
    with suppress(ValueError):
        ip_address(unquote(name))
        return True
    return False


def _credentials(authorization: str) -> bytes:
    scheme, _, encoded = authorization.partition(" ")
    if scheme.lower() != "basic":
        return b""
    with suppress(ValueError):
        return base64.b64decode(encoded.strip(), validate=True)
    return b""


def _event(name: str, content: object) -> bytes:
    return f"event: {name}\ndata: {json.dumps(content, separators=(',', ':'))}\n\n".encode()


def _json_response(status: int, content: object, *, with_body: bool) -> bytes:
    return _response(status, "application/json", json.dumps(content).encode() + b"\n", with_body=with_body)


def _response(status: int, media_type: str, body: bytes, *, with_body: bool = True, extra: str = "") -> bytes:
    return http_response(status, media_type, body, with_body=with_body, extra=_HEADERS + extra)
