"""Writes the OpenAPI document of the public API, `openapi.json` in this folder (`make reference`).

The document repeats 22 headers in some 80 responses. Here each set of headers, each error and each kind of operation
stands once. What the server sends with every response comes from `headers`, so the two cannot differ.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from typing import Any

from distributor_node.services.api import headers

Json = dict[str, Any]

VERSION = "0.1.0"
OBJECT_ID: Json = {"type": "string", "pattern": "^[A-Za-z0-9][A-Za-z0-9._~-]{0,127}$"}


def document() -> Json:
    """The whole document of the public API."""
    return {
        **preamble(
            "Distributor node public API",
            "Serves media objects from a bounded cache that is filled on demand from storage nodes. "
            "GET and HEAD ignore a request body.",
        ),
        "tags": [
            {"name": "public", "description": "What clients use."},
            {"name": "node", "description": "The node's own state."},
        ],
        "paths": {
            "/api/v1/status": _node_path(
                "status", "The node's current status", ref("schemas", "StatusResponse")
            ),
            "/api/v1/buckets": _node_path(
                "buckets", "The buckets the node serves", ref("schemas", "BucketsResponse")
            ),
            "/api/v1/openapi.json": _node_path("openapi", "This document", {"type": "object"}),
            "/api/v1/assets/{objectId}": _asset_path(),
            "/healthz": _node_path(
                "healthz", "This port serves", record(status={"type": "string", "enum": ["ok"]})
            ),
        },
        "components": {
            "headers": HEADERS,
            "parameters": PARAMETERS,
            "responses": _shared_responses(),
            "schemas": SCHEMAS,
        },
    }


# Parts that the operator API's document is made of as well.


def preamble(title: str, description: str) -> Json:
    """What stands at the top of a document."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": title,
            "version": VERSION,
            "license": {"name": "GPL-3.0-only", "identifier": "GPL-3.0-only"},
            "description": description,
        },
        "servers": [{"url": "/"}],
    }


def ref(kind: str, name: str) -> Json:
    """A reference to a component."""
    return {"$ref": f"#/components/{kind}/{name}"}


def content(schema: Json, media_type: str = "application/json") -> Json:
    """The `content` of a request or a response."""
    return {media_type: {"schema": schema}}


def record(optional: Iterable[str] = (), **properties: Json) -> Json:
    """The schema of a JSON object. Its fields are required except those in `optional`."""
    required = [name for name in properties if name not in set(optional)]
    return {"type": "object", "properties": properties, "required": required}


def array(items: Json, **more: Any) -> Json:
    """The schema of a list."""
    return {"type": "array", "items": items, **more}


def count(description: str = "") -> Json:
    """The schema of a number of things, or of bytes."""
    return {"type": "integer", "minimum": 0, **({"description": description} if description else {})}


def render(whole: Json) -> str:
    """The text of the file."""
    return json.dumps(whole, indent=2, ensure_ascii=False) + "\n"


# Headers, and the sets of them that responses carry.


def _header(description: str, *, required: bool = True, **schema: Any) -> Json:
    described = {"description": description, "schema": {"type": "string", **schema}}
    return {**described, "required": True} if required else described


HEADERS: Json = {
    "X-Cache": _header(
        "hit: fully cached. pending: being fetched. miss: neither; a GET starts a fetch.",
        enum=["hit", "pending", "miss"],
    ),
    "X-Data-Source": _header(
        "local: from the node's volume. external: proxied from a source.", enum=["local", "external"]
    ),
    "Cache-Control": _header(
        "A hit is immutable. An unverified response is fresh for minutes. Errors are never stored."
    ),
    "Cache-Status": _header("RFC 9211."),
    "ETag": _header(
        "With a content hash: strong, and the same for the same content on every node. Else the source's own, if it "
        "has one.",
        required=False,
        pattern='^(W/)?"[^"]*"$',
    ),
    "Last-Modified": _header("If the node knows it.", required=False),
    "Accept-Ranges": _header("Always bytes.", enum=["bytes"]),
    "Content-Disposition": _header(
        "The id with the extension of the media type, and the manifest's name if there is one. attachment for HTML, "
        "XML, SVG and PDF, and with ?download; inline for all others.",
        pattern='^(inline|attachment)(; filename="[^"]*")?(; filename\\*=UTF-8\'\'.*)?$',
    ),
    "Content-Range": _header("RFC 9110 section 14.4."),
    "Content-Length": _header(
        "Bytes of the body; absent only if no source tells the size.",
        required=False,
        type="integer",
        minimum=0,
    ),
    "Access-Control-Allow-Origin": _header("Any page may read the response.", enum=["*"]),
    "Access-Control-Expose-Headers": _header("Headers that scripts may read."),
    "Access-Control-Allow-Methods": _header("Response to a preflight."),
    "Access-Control-Allow-Headers": _header("Response to a preflight: the headers that it asks for."),
    "Access-Control-Allow-Private-Network": _header(
        "If the preflight asks for it.", required=False, enum=["true"]
    ),
    "Vary": _header("Response to a preflight."),
    "Access-Control-Max-Age": _header(
        "Seconds that a browser may cache the preflight.", required=False, type="integer"
    ),
    "Timing-Allow-Origin": _header("Any page may measure the download.", enum=["*"]),
    "Cross-Origin-Resource-Policy": _header("Any page may embed the response.", enum=["cross-origin"]),
    "X-Content-Type-Options": _header("Always nosniff.", enum=["nosniff"]),
    "Content-Security-Policy": _header("An object never runs scripts."),
    "X-Request-ID": _header("The request's id, taken from the request if it is short and printable."),
    "Allow": _header("Methods of this path.", required=False),
    "Retry-After": _header("Seconds.", type="integer", minimum=0),
}

_NODE = ("X-Request-ID", *headers.CROSS_ORIGIN, "Cache-Control")
_ASSET_ERROR = ("X-Request-ID", *headers.ASSET, "Cache-Control")
_NOT_MODIFIED = (
    "X-Request-ID", *headers.ASSET, "X-Cache", "Cache-Control", "Cache-Status", "ETag", "Last-Modified"
)  # fmt: skip
_DESCRIBED = (
    *_NOT_MODIFIED,
    *(name for name in headers.ASSET_CONTENT if name not in headers.ASSET),
    "Content-Disposition",
    "Content-Length",
)
_WHOLE = (*_DESCRIBED, "X-Data-Source")
_PART = (*_WHOLE, "Content-Range")


def _response(description: str, names: Iterable[str], body: Json | None = None) -> Json:
    described = {"description": description, "headers": {name: ref("headers", name) for name in names}}
    return described if body is None else {**described, "content": body}


# Errors: status, name of the component, description, headers beside those of every error.
# A response to HEAD has no body: its component bears the name with "Head" behind it.

_ERROR = content(ref("schemas", "ErrorResponse"))
_UNAVAILABLE = ("Retry-After",)

ASSET_ERRORS = (
    (400, "AssetMalformed", "Malformed object id or request.", ()),
    (404, "AssetUnknown", "The object does not exist, or has not been uploaded yet.", ()),
    (412, "AssetPreconditionFailed", "If-Match or If-Unmodified-Since does not hold.", ("X-Cache",)),
    (416, "AssetRange", "No byte of the range exists.", ("Content-Range", "X-Cache")),
    (421, "AssetElsewhere", "The object exists, but this node does not serve it.", ()),
    (500, "AssetError", "Unexpected server error", ()),
    (502, "AssetSourcesFailed", "Every source failed.", ()),
    (
        503,
        "AssetUnavailable",
        "Unavailable at the moment, for example because the catalog is unreachable.",
        _UNAVAILABLE,
    ),
    (504, "AssetSourcesSlow", "Every source is too slow.", ()),
)
NODE_ERRORS = (
    (400, "Malformed", "Malformed request", ()),
    (500, "Error", "Unexpected server error", ()),
    (503, "Unavailable", "Not available at the moment", _UNAVAILABLE),
)
REQUEST_ERRORS = (
    (408, "Timeout", "The request took too long to arrive."),
    (413, "BodyTooLarge", "The request has a body above 64 KiB."),
    (414, "TargetTooLong", "The request's target is too long."),
    (417, "Expectation", "An Expect that is not 100-continue."),
    (431, "HeadTooLarge", "The request's head is above 16 KiB."),
)
"""Detected before the method is looked at, so these have a body for HEAD as well."""
_NEVER_FOR_HEAD = {416}


def _shared_responses() -> Json:
    responses: Json = {}
    for errors, names in ((ASSET_ERRORS, _ASSET_ERROR), (NODE_ERRORS, _NODE)):
        for status, name, description, more in errors:
            responses[name] = _response(description, (*names, *more), _ERROR)
            if status not in _NEVER_FOR_HEAD:
                responses[f"{name}Head"] = _response(description, (*names, *more))
    for _, name, description in REQUEST_ERRORS:
        responses[name] = _response(description, _NODE, _ERROR)
    preflight = ("X-Request-ID", *headers.PREFLIGHT, "Access-Control-Allow-Private-Network")
    responses["Preflight"] = _response("Allowed methods and headers of this path.", preflight)
    return responses


def _responses(successes: dict[int, Json], errors: Iterable[tuple[int, str]], *, head: bool = False) -> Json:
    """Those of one operation: `successes`, then `errors` by status and component."""
    listed: Json = {str(status): described for status, described in successes.items()}
    for status, name in errors:
        if not (head and status in _NEVER_FOR_HEAD):
            listed.setdefault(str(status), ref("responses", f"{name}Head" if head else name))
    return {**listed, **{str(status): ref("responses", name) for status, name, _ in REQUEST_ERRORS}}


# Operations.


def _operation(name: str, summary: str, tag: str, responses: Json, parameters: Iterable[str] = ()) -> Json:
    described = {"operationId": name, "summary": summary, "tags": [tag], "responses": responses}
    listed = [ref("parameters", parameter) for parameter in parameters]
    return {**described, "parameters": listed} if listed else described


def _node_path(name: str, summary: str, schema: Json) -> Json:
    """GET, HEAD and OPTIONS of a path about the node itself."""
    errors = [(status, component) for status, component, _, _ in NODE_ERRORS]
    get, head = {200: _response("OK", _NODE, content(schema))}, {200: _response("OK", _NODE)}
    options = _responses({204: ref("responses", "Preflight")}, errors[:1])
    asked = ("X-Request-ID",)
    return {
        "get": _operation(name, summary, "node", _responses(get, errors), asked),
        "head": _operation(
            f"{name}Head", f"{summary} (headers only)", "node", _responses(head, errors, head=True), asked
        ),
        "options": _operation(f"{name}Options", "Allowed methods", "node", options),
    }


def _asset_path() -> Json:
    errors = [(status, component) for status, component, _, _ in ASSET_ERRORS]
    body = content({"type": "string", "format": "binary"}, "*/*")
    not_modified = _response("The client's copy is current", _NOT_MODIFIED)
    get = {
        200: _response("The whole object", _WHOLE, body),
        206: _response("One range of the object", _PART, body),
        304: not_modified,
    }
    head = {200: _response("The headers of a GET", _DESCRIBED), 304: not_modified}
    conditions = ("If-Match", "If-None-Match", "If-Modified-Since", "If-Unmodified-Since", "X-Request-ID")
    return {
        "parameters": [ref("parameters", "ObjectId"), ref("parameters", "download")],
        "get": _operation(
            "asset", "The media file", "public", _responses(get, errors), ("Range", "If-Range", *conditions)
        ),
        "head": _operation(
            "assetHead",
            "The headers of a GET; never starts a fetch",
            "public",
            _responses(head, errors, head=True),
            conditions,
        ),
        "options": _operation(
            "assetOptions",
            "CORS preflight",
            "public",
            _responses({204: ref("responses", "Preflight")}, errors[:1]),
        ),
    }


def _request_header(name: str, description: str) -> Json:
    return {
        "name": name,
        "in": "header",
        "required": False,
        "description": description,
        "schema": {"type": "string"},
    }


PARAMETERS: Json = {
    "ObjectId": {
        "name": "objectId",
        "in": "path",
        "required": True,
        "description": "Data Object ID. Of a manifest or an origin also any path (RFC 3986), percent-encoded.",
        "schema": OBJECT_ID,
        "example": "1",
    },
    "download": {
        "name": "download",
        "in": "query",
        "required": False,
        "description": "The browser saves the object, under this name if it is not empty.",
        "allowEmptyValue": True,
        "schema": {"type": "string"},
    },
    **{
        name: _request_header(name, description)
        for name, description in (
            ("Range", "Bytes; one that is malformed is ignored."),
            ("If-Range", "Entity tag or date; the whole object if it does not match."),
            ("If-Match", "Entity tags."),
            ("If-None-Match", "Entity tags."),
            ("If-Modified-Since", "HTTP date."),
            ("If-Unmodified-Since", "HTTP date."),
            ("X-Request-ID", "An id for logs."),
        )
    },
}

_TEXT: Json = {"type": "string"}


def _age(figure: str) -> Json:
    return {
        "type": ["integer", "null"],
        "minimum": 0,
        "description": f"Seconds since {figure} was read. null: never.",
    }


_BASE_URLS: Json = {"type": "array", "items": {"type": "string", "format": "uri"}}

SCHEMAS: Json = {
    "ErrorResponse": {
        **record(optional=["type"], type=_TEXT, message=_TEXT),
        "additionalProperties": False,
    },
    "StatusResponse": record(
        optional=[
            "downloadsQueued",
            "partialObjects",
            "partialBytes",
            "workersAlive",
            "draining",
            "version",
            "workerId",
            "nodeEnv",
            "queryNodeStatus",
            "peers",
        ],
        id=_TEXT,
        objectsInCache=count(),
        storageLimit=count(),
        storageUsed=count(),
        uptime=count("Seconds."),
        downloadsInProgress=count(),
        downloadsQueued=count("Jobs that have not begun."),
        partialObjects=count("Partial objects that no download continues now."),
        partialBytes=count(
            "Reserved for them: what they hold, some seconds after their downloads have ended."
        ),
        workersAlive=count("Fetchers."),
        draining={
            "type": "boolean",
            "description": "Whether an operator has the node serve what is cached, proxy the rest and start no fetch.",
        },
        version=_TEXT,
        workerId=count("Only if the node serves a worker's buckets."),
        nodeEnv=_TEXT,
        queryNodeStatus=record(
            url=_TEXT,
            chainHead=count("The last known figure, as those below. 0: never read."),
            blocksProcessed=count(),
            packageVersion=_TEXT,
            age=_age("blocksProcessed"),
            chainHeadAge=_age("chainHead"),
        ),
        peers={
            **record(alive=_BASE_URLS, known=_BASE_URLS),
            "description": "Only in a fleet: the other nodes that are alive, and all others.",
        },
    ),
    "BucketsResponse": {
        "oneOf": [
            record(bucketIds=array({"type": "string", "pattern": "^[0-9]+:[0-9]+$"})),
            record(allByWorkerId=count()),
        ]
    },
}

if __name__ == "__main__":
    sys.stdout.write(render(document()))
