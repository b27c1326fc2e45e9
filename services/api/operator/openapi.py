"""Writes the OpenAPI document of the operator API, `openapi.json` in this folder (`make reference`).

The schemas of request bodies are those of the models in `schemas`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any

from distributor_node.services.api.openapi import Json, array, content, count, preamble, record, ref, render
from distributor_node.services.api.operator.commands import ObjectState
from distributor_node.services.api.operator.schemas import (
    BUCKET_ID_SCHEMA,
    MAX_IDS,
    OBJECT_ID_SCHEMA,
    PURGE_BODIES,
    WARMING_BODIES,
    BucketsBody,
    EmptyBody,
    IdsBody,
    ToggleBody,
    WorkerBody,
)
from distributor_node.shared.domain.eviction import POLICY_NAMES

_PAGE: list[Json] = [
    {
        "name": "limit",
        "in": "query",
        "schema": {"type": "integer", "minimum": 1, "maximum": MAX_IDS, "default": 100},
    },
    {
        "name": "after",
        "in": "query",
        "description": "`next` of the page before.",
        "schema": ref("schemas", "ObjectId"),
    },
]
_SHUTTING_DOWN = "or the node is shutting down"
_ENDING = "The node is shutting down"


def document() -> Json:
    """The whole document of the operator API."""
    return {
        **preamble(
            "Distributor node operator API",
            "Commands to the whole node, on a separate port. Every request carries its own JSON Web Token, signed "
            "with the operator's secret: HS256, claims `iat` (at most 5 minutes old), `reqBody` (the request's JSON "
            "body, `{}` where there is none) and `reqUrl` (path and query). A token can be used once.",
        ),
        "security": [{"operator": []}],
        "paths": {f"/api/v1/{name}": operations for name, operations in _paths().items()},
        "components": {
            "securitySchemes": {"operator": {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"}},
            "responses": {
                "NotAuthorised": _failure(
                    "Not authorised; the response does not tell what is wrong with the token",
                    "WWW-Authenticate",
                ),
                "Unavailable": _failure("The state store is unreachable; nothing was changed", "Retry-After"),
            },
            "schemas": SCHEMAS,
        },
    }


def _paths() -> Json:
    ids = _body(IdsBody)
    return {
        "stop-api": _command(
            "stopApi",
            "Close the public port in every process",
            _body(EmptyBody),
            conflict=f"Stopped already; {_SHUTTING_DOWN}",
        ),
        "start-api": _command(
            "startApi",
            "Open the public port again",
            _body(EmptyBody),
            conflict=f"Not stopped; {_SHUTTING_DOWN}",
        ),
        "shutdown": _command("shutdown", "End every API process, with exit code 0", _body(EmptyBody)),
        "set-worker": _command(
            "setWorker",
            "Serve as this worker",
            _body(WorkerBody),
            "Assigned",
            conflict=f"With `check`, and the catalog knows no bucket of the worker; {_SHUTTING_DOWN}",
        ),
        "set-buckets": _command(
            "setBuckets",
            "Serve these buckets, or without `buckets` all of the worker",
            _body(BucketsBody),
            "Assigned",
            conflict=f"With `check`, and the catalog does not have them; without `buckets`, and no worker is known; "
            f"{_SHUTTING_DOWN}",
        ),
        "reset-assignment": _command(
            "resetAssignment", "Serve the buckets or the worker of the settings again", _body(EmptyBody)
        ),
        "drain": _command("drain", "Serve what is cached, take no new fetches", _body(ToggleBody)),
        "purge": _command(
            "purge",
            "Remove objects, pinned ones too",
            _one_of(PURGE_BODIES),
            "Purging",
            description="The evictor removes them. Responses that are being sent are completed. An object that "
            "is being fetched is removed when its fetch has ended.",
        ),
        "pin": _command("pin", "Never evict these objects", ids, "Pins"),
        "unpin": _command("unpin", "Let these objects be evicted again", ids, "Pins"),
        "warm": {
            **_command(
                "warm",
                "Fetch objects ahead of requests",
                _one_of(WARMING_BODIES),
                "Warming",
                description="At low priority, and only as long as there is room: nothing is evicted for it.",
                conflict="Another warming is in progress; a bucket that the catalog does not have; without ids, "
                "and the catalog cannot list its objects; "
                f"{_SHUTTING_DOWN}",
            ),
            **_query("warming", "Progress of the latest warming", "Warming"),
        },
        "cache": _query(
            "cache",
            "The cached objects, page by page in the order of their ids",
            "Page",
            parameters=_PAGE,
        ),
        "pins": _query(
            "pins",
            "The pinned objects, here or not, page by page in the order of their ids",
            "PinnedPage",
            parameters=_PAGE,
        ),
        "cache/{id}": _query(
            "explain",
            "What the node knows of one object, and its place in the order of eviction. A query belongs to the id",
            "Explanation",
            parameters=[{"name": "id", "in": "path", "required": True, "schema": ref("schemas", "ObjectId")}],
        ),
        "downloads": _query("downloads", "Fetches in progress, and suspended ones", "Downloads"),
        "orders": _query("orders", "The operator state in force", "Orders"),
        "openapi.json": {
            "get": {
                "operationId": "openapi",
                "summary": "This document",
                "security": [],
                "responses": {"200": {"description": "OK", "content": content({"type": "object"})}},
            }
        },
    }


def _command(
    name: str,
    summary: str,
    body: Json,
    result: str = "Orders",
    *,
    description: str = "",
    conflict: str = _ENDING,
) -> Json:
    """A POST. `result`: the schema of its response; `conflict`: what a 409 means."""
    required = body != _body(EmptyBody)
    return {
        "post": {
            "operationId": name,
            "summary": summary,
            **({"description": description} if description else {}),
            "requestBody": {"required": required, "content": content(body)},
            "responses": {
                "200": {"description": "Done", "content": content(ref("schemas", result))},
                "400": _error("Malformed body; the message names the field"),
                "401": ref("responses", "NotAuthorised"),
                "409": _error(conflict),
                "503": ref("responses", "Unavailable"),
            },
        }
    }


def _query(name: str, summary: str, result: str, *, parameters: Iterable[Json] = ()) -> Json:
    """A GET, with a 400 if it takes parameters."""
    listed = list(parameters)
    return {
        "get": {
            "operationId": name,
            "summary": summary,
            **({"parameters": listed} if listed else {}),
            "responses": {
                "200": {"description": "OK", "content": content(ref("schemas", result))},
                **({"400": _error("Malformed query")} if listed else {}),
                "401": ref("responses", "NotAuthorised"),
                "503": ref("responses", "Unavailable"),
            },
        }
    }


def _error(description: str) -> Json:
    return {"description": description, "content": content(ref("schemas", "Error"))}


def _failure(description: str, header: str) -> Json:
    return {**_error(description), "headers": {header: {"schema": {"type": "string"}}}}


# Schemas.


def _one_of(models: Mapping[str, type[EmptyBody]]) -> Json:
    return {"oneOf": [_body(model) for model in models.values()]}


def _body(model: type[EmptyBody]) -> Json:
    """The schema of a model, without the titles and defaults that pydantic adds."""
    schema = model.model_json_schema()
    properties = {
        name: {key: value for key, value in described.items() if key not in ("title", "default")}
        for name, described in schema["properties"].items()
    }
    whole: Json = {"type": "object", "additionalProperties": False}
    if properties:
        whole["properties"] = properties
    return {**whole, "required": schema["required"]} if "required" in schema else whole


def _closed(**properties: Json) -> Json:
    """The schema of a JSON object that has all of these fields and no others."""
    return {**record(**properties), "additionalProperties": False}


def _or_null(schema: Json) -> Json:
    """The schema, or null."""
    if "type" not in schema or "properties" in schema:
        return {"oneOf": [schema, {"type": "null"}]}
    return {**schema, "type": [schema["type"], "null"]}


_TEXT: Json = {"type": "string"}
_FLAG: Json = {"type": "boolean"}
_OBJECT_ID = ref("schemas", "ObjectId")


_PATH_OF_ID = {
    "type": ["string", "null"],
    "description": "The path of which `id` is the digest, percent-encoded, with its query. Null: `id` is the name "
    "itself, or the path is not known.",
}


def _number(description: str) -> Json:
    return {"type": "number", "description": description}


_STATE: Json = {
    "enum": [state.value for state in ObjectState],
    "description": "`stored`: complete on the volume. `fetching`: its fetch is under way or asked for. `partial`: some "
    "of its bytes are here. `absent`: not here; the first request fetches it. `unknown`: the catalog does not know "
    "it. `not_uploaded`, `unassigned`: as the catalog says. `unchecked`: not here, and the catalog did not reply.",
}

_ORDERS: Json = {
    "stopped": _FLAG,
    "draining": _FLAG,
    "shuttingDown": _FLAG,
    "workerId": _or_null({"type": "integer"}),
    "buckets": _or_null(array(BUCKET_ID_SCHEMA)),
}

SCHEMAS: dict[str, Any] = {
    "ObjectId": OBJECT_ID_SCHEMA,
    "Error": _closed(type=_TEXT, message=_TEXT),
    "Orders": _closed(**_ORDERS),
    "Assigned": _closed(
        **_ORDERS,
        checked={
            **_FLAG,
            "description": "Whether the catalog has been asked. False also if it has not replied in time.",
        },
    ),
    "Purging": _closed(
        purging=count("Objects that are removed if they are here."),
        objects={
            **array(_closed(id=_OBJECT_ID, path=_PATH_OF_ID, state=_STATE)),
            "description": "Those that were named, as the purge found them.",
        },
    ),
    "Pins": _closed(
        changed=count("Objects that this request has pinned or unpinned."),
        pinned=count("All objects that are pinned now, here or not."),
        objects=array(
            _closed(
                id=_OBJECT_ID,
                path=_PATH_OF_ID,
                state=_STATE,
                changed={**_FLAG, "description": "False: it was pinned already, or was not pinned."},
            )
        ),
    ),
    "PinnedPage": _closed(
        pins=array(_closed(id=_OBJECT_ID, path=_PATH_OF_ID, state=_STATE)),
        next=_or_null(_TEXT),
        total=count("All objects that are pinned, here or not."),
    ),
    "Warming": _closed(
        state={"enum": ["none", "waiting", "listing", "fetching", "finished"]},
        total=count(),
        done=count(),
        skipped=count("Not fetched, for the reasons in `skippedFor`."),
        skippedFor={
            "type": "object",
            "additionalProperties": count(),
            "description": "How many were skipped, by reason. `stored`: cached already. `unknown`, `not_uploaded`, "
            "`unassigned`: as the catalog says. `too_large`: or of unknown size. `kept_by_peer`: another node of the "
            "fleet keeps it. `no_room`. `malformed`: the catalog has no such ids.",
        },
        failed=count(),
        notWarmed=array(
            _closed(id=_OBJECT_ID, reason=_TEXT),
            description="Up to ten objects that are not here afterwards, failed ones in preference, each with one of "
            "these reasons, or `failed`.",
        ),
        reason={**_TEXT, "description": "Why it waits, or why it ended early. Empty: it does neither."},
    ),
    "Page": _closed(
        objects=array(
            _closed(
                id=_OBJECT_ID,
                path=_PATH_OF_ID,
                size=count(),
                lastAccess=_number("POSIX seconds."),
                views=count(),
                pinned=_FLAG,
                state={"enum": ["stored", "leaving"]},
            )
        ),
        next=_or_null(_TEXT),
        total=count(),
        bytes=count(),
        pinned=count("Pinned objects that are cached."),
        pinnedBytes=count(),
        partialObjects=count("Partial objects that no fetch continues now."),
        partialBytes=count("Reserved for them: what they hold, some seconds after their fetches have ended."),
    ),
    "Download": _closed(
        id=_OBJECT_ID,
        path=_PATH_OF_ID,
        phase={"enum": ["claimed", "queued", "fetching", "parked"]},
        bytes=count("On disk."),
        size=count("Of the object; 0 before its fetch has started."),
        source=_or_null(_TEXT),
        worker=_TEXT,
        age=_number("Seconds in this phase."),
        reserved=count("Bytes, with those of its record. Of a parked fetch, what its file holds."),
        views=_or_null(count("Of a partial object, as the evictor has counted them. Null: none yet.")),
        lastAccess=_or_null(_number("Likewise, in POSIX seconds.")),
    ),
    "Downloads": _closed(downloads=array(ref("schemas", "Download"))),
    "Explanation": _closed(
        words={
            **array(_TEXT),
            "description": "What follows in sentences, as on the node's page, with what the evictor and the catalog "
            "say of an object that is not here.",
        },
        id=_OBJECT_ID,
        path=_PATH_OF_ID,
        state={
            "enum": [
                "stored",
                "leaving",
                "missing",
                "unindexed",
                "claimed",
                "queued",
                "fetching",
                "parked",
                "failed",
                "absent",
                "unknown",
                "not_uploaded",
                "unassigned",
                "unchecked",
            ],
            "description": "`leaving`: its removal has begun. `missing`: in the index, but its file is gone. "
            "`unindexed`: its file is there, but not in the index yet. `claimed` to `parked`: the phase of its "
            "fetch. `failed`: its last fetch failed a short time ago. The others: not here, as in the answer to `pin`.",
        },
        size=_or_null(count("Bytes.")),
        hash=_or_null(
            {
                **_TEXT,
                "description": "Of a complete object whose hash is known: `sha256:` and hexadecimal digits, or "
                "base58 of a blake3 multihash.",
            }
        ),
        views=_or_null(count("As the evictor has counted them; some seconds late.")),
        lastAccess=_or_null(_number("POSIX seconds; some seconds late.")),
        policy={"enum": list(POLICY_NAMES)},
        priority=_or_null(_number("Of the policy gdsf; the lowest goes first.")),
        inflation=_or_null(
            _number("L of the policy gdsf: the highest priority of all objects evicted so far.")
        ),
        bytesBefore=_or_null(
            count(
                "Bytes that would be evicted before this object. Null unless it is stored or parked, and not "
                "pinned."
            )
        ),
        objectsBefore=_or_null(count("Objects that would be evicted before this one.")),
        pinned=_FLAG,
        sending=_or_null(
            {
                **_FLAG,
                "description": "Whether a process of the container that answers is sending it now. "
                "Null: it cannot be told.",
            }
        ),
        fetch=_or_null(ref("schemas", "Download")),
        failure=_or_null(
            _closed(reason=_TEXT, secondsLeft=_number("Seconds until it may be fetched again."))
        ),
    ),
}

if __name__ == "__main__":
    sys.stdout.write(render(document()))
