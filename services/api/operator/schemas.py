"""What the bodies of operators' requests say. HttpError 400 for all that means nothing."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from distributor_node.services.api.errors import HttpError
from distributor_node.shared.domain.errors import InvalidInput
from distributor_node.shared.domain.objects import ObjectId, parse_bucket_id
from distributor_node.shared.domain.operator_state import MAX_WORKER_ID, WarmingScope

MAX_IDS = 1000
_LIMIT = re.compile(r"[0-9]{1,4}", re.ASCII)


def parse_empty(body: Any) -> None:
    """A command without arguments."""
    _fields(body, set())


def parse_worker(body: Any) -> int:
    """`{"workerId": n}`."""
    worker_id = _fields(body, {"workerId"}).get("workerId")
    if not isinstance(worker_id, int) or isinstance(worker_id, bool) or not 0 <= worker_id <= MAX_WORKER_ID:
        raise _malformed("workerId: want a whole number, 0 or more")
    return worker_id


def parse_buckets(body: Any) -> frozenset[str] | None:
    """`{"buckets": ["0:1", …]}`; None if there are no `buckets`: all of the worker."""
    buckets = _fields(body, {"buckets"}).get("buckets")
    if buckets is None:
        return None
    if not isinstance(buckets, list) or not buckets or not all(isinstance(bucket, str) for bucket in buckets):
        raise _malformed("buckets: want a list of bucket ids, or none at all for those of the worker")
    try:
        return frozenset(parse_bucket_id(bucket) for bucket in buckets)
    except InvalidInput as error:
        raise _malformed(str(error)) from error


def parse_ids(body: Any) -> tuple[ObjectId, ...]:
    """`{"ids": [...]}`."""
    return _ids(_fields(body, {"ids"}).get("ids"))


def parse_purge(body: Any) -> tuple[ObjectId, ...] | None:
    """`{"ids": [...]}`, or `{"all": true}`: None."""
    fields = _exactly_one(_fields(body, {"ids", "all"}))
    return None if "all" in fields else _ids(fields["ids"])


def parse_warming_scope(body: Any) -> WarmingScope:
    """`{"ids": [...]}`, `{"bucket": "0:1"}` or `{"all": true}`."""
    fields = _exactly_one(_fields(body, {"ids", "bucket", "all"}))
    if "ids" in fields:
        return WarmingScope(object_ids=_ids(fields["ids"]))
    if "all" in fields:
        return WarmingScope()
    try:
        return WarmingScope(bucket_id=parse_bucket_id(str(fields["bucket"])))
    except InvalidInput as error:
        raise _malformed(str(error)) from error


def parse_toggle(body: Any) -> bool:
    """`{"on": true}` or `{"on": false}`."""
    switch = _fields(body, {"on"}).get("on")
    if not isinstance(switch, bool):
        raise _malformed("on: want true or false")
    return switch


def parse_page(query: Mapping[str, str]) -> tuple[int, str]:
    """`limit` (1 to 1000, default 100) and `after` (an object id, or nothing) of a listing."""
    limit, after = query.get("limit", "100"), query.get("after", "")
    if set(query) - {"limit", "after"} or not _LIMIT.fullmatch(limit) or not 1 <= int(limit) <= MAX_IDS:
        raise _malformed(f"want limit (1 to {MAX_IDS}) and after, if anything")
    if after:
        try:
            ObjectId.parse(after)
        except InvalidInput as error:
            raise _malformed(str(error)) from error
    return int(limit), after


def _fields(body: Any, allowed: set[str]) -> dict[str, Any]:
    if not isinstance(body, dict) or set(body) - allowed:
        names = ", ".join(sorted(allowed)) or "nothing"
        raise _malformed(f"want a JSON object with {names} in it")
    return body


def _exactly_one(fields: dict[str, Any]) -> dict[str, Any]:
    if len(fields) != 1 or fields.get("all", True) is not True:
        raise _malformed("say one thing: all (true), or which")
    return fields


def _ids(found: Any) -> tuple[ObjectId, ...]:
    if not isinstance(found, list) or not 0 < len(found) <= MAX_IDS:
        raise _malformed(f"ids: want a list of 1 to {MAX_IDS} object ids")
    if not all(isinstance(object_id, str) for object_id in found):
        raise _malformed("ids: want texts")
    try:
        return tuple(dict.fromkeys(ObjectId.parse(object_id) for object_id in found))
    except InvalidInput as error:
        raise _malformed(str(error)) from error


def _malformed(message: str) -> HttpError:
    return HttpError(400, message, "malformed_request")
