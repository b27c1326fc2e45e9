"""What a storage node process serves beside its API: the faults, the request log, and the demo page."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.demo.answers import Response, error_response, json_response
from services.demo.knob_panel import FaultRegistry
from services.demo.objects import BytesContent, DemoObject
from services.demo.request_log import RequestLog
from services.demo.wire import Request


@dataclass(frozen=True, slots=True)
class Site:
    """The demo page: its file, and the base URL of the node through which it loads all media."""

    page: Path
    node_url: str
    objects: tuple[DemoObject, ...]

    def description(self) -> dict[str, Any]:
        """What `/demo.json` says: the node, and every object of the manifest with the id of its subtitles."""
        return {"node_url": self.node_url.rstrip("/"), "objects": list(_described(self.objects))}


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
    """The answer to a request for the control endpoints or the page; None if the path is none of them."""
    if request.path == "/faults":
        return _faults(request, faults)
    if request.path == "/requests":
        return _requests(request, log)
    if site is not None and request.path in ("/", "/index.html", "/demo.json"):
        if request.method not in ("GET", "HEAD"):
            return error_response(405, "method_not_allowed", "GET or HEAD")
        return json_response(200, site.description()) if request.path == "/demo.json" else _page(site)
    return None


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


def _page(site: Site) -> Response:
    html = site.page.read_bytes()
    headers = (("Content-Type", "text/html; charset=utf-8"), ("Cache-Control", "no-cache"))
    return Response(200, headers, BytesContent(html), 0, len(html))
