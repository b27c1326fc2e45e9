"""Request bodies and queries of the operator API: pydantic models, which the OpenAPI document is made from as well.

Each `parse_…` function turns the JSON of one request into values of the domain. It raises HttpError 400 with the field,
what was expected there and what came: `ids[2]: expected an object id, got "a/b"`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError, WithJsonSchema
from pydantic.json_schema import SkipJsonSchema
from pydantic_core import ErrorDetails, PydanticCustomError

from distributor_node.services.api.errors import HttpError
from distributor_node.shared.domain.errors import InvalidInput
from distributor_node.shared.domain.objects import ObjectId, parse_bucket_id
from distributor_node.shared.domain.operator_state import MAX_WORKER_ID, WarmingScope

MAX_IDS = 1000
MAX_SHOWN = 60
"""Characters of a received value that an error message repeats."""
OBJECT_ID_SCHEMA = {"type": "string", "pattern": "^[A-Za-z0-9][A-Za-z0-9._~-]{0,127}$"}
BUCKET_ID_SCHEMA = {"type": "string", "pattern": "^[0-9]{1,20}:[0-9]{1,20}$"}
_DECIMAL = re.compile(r"[0-9]{1,4}", re.ASCII)


def parse_empty(body: Any) -> None:
    """Check the body of a command without arguments."""
    _validate(EmptyBody, body)


def parse_worker(body: Any) -> tuple[int, bool]:
    """Return the worker id of `{"workerId": n}`, and whether it is to be checked."""
    order = _validate(WorkerBody, body)
    return order.worker_id, order.check


def parse_buckets(body: Any) -> tuple[frozenset[str] | None, bool]:
    """Return the bucket ids of `{"buckets": ["0:1", …]}`, and whether they are to be checked.

    Without `buckets`: None, which means all of the worker.
    """
    order = _validate(BucketsBody, body)
    return None if order.buckets is None else frozenset(order.buckets), order.check


def parse_toggle(body: Any) -> bool:
    """Return the value of `{"on": true}` or `{"on": false}`."""
    return _validate(ToggleBody, body).on


def parse_ids(body: Any) -> tuple[ObjectId, ...]:
    """Return the ids of `{"ids": […]}`, each once."""
    return _validate(IdsBody, body).unique


def parse_purge(body: Any) -> tuple[ObjectId, ...] | None:
    """Return the ids of `{"ids": […]}`, or None for `{"all": true}`."""
    scope = _validate_one_of(PURGE_BODIES, body)
    return scope.unique if isinstance(scope, IdsBody) else None


def parse_warming_scope(body: Any) -> WarmingScope:
    """Read `{"ids": […]}`, `{"bucket": "0:1"}` or `{"all": true}`."""
    scope = _validate_one_of(WARMING_BODIES, body)
    if isinstance(scope, IdsBody):
        return WarmingScope(object_ids=scope.unique)
    return WarmingScope(bucket_id=scope.bucket) if isinstance(scope, BucketBody) else WarmingScope()


def parse_page(query: Mapping[str, str]) -> tuple[int, str]:
    """Return `limit` (1 to 1000, default 100) and `after` (an object id, or empty) of a listing."""
    limit, after = query.get("limit", "100"), query.get("after", "")
    for name in query:
        if name not in ("limit", "after"):
            raise _malformed("query", "limit or after", name)
    if not _DECIMAL.fullmatch(limit) or not 1 <= int(limit) <= MAX_IDS:
        raise _malformed("limit", f"a whole number from 1 to {MAX_IDS}", limit)
    return int(limit), parse_object_id(after, "after") if after else ""


def parse_object_id(text: str, place: str = "id", query: str = "") -> ObjectId:
    """Read an object id in a path or query: percent-encoded, or the digest of one. `query`: that belongs to the id."""
    try:
        return (
            ObjectId.parse(text)
            if ObjectId.is_plain(text) and not query
            else ObjectId.parse_path(text, query)
        )
    except InvalidInput as error:
        raise _malformed(place, "an object id", text) from error


# The bodies. A field's description is what an error message says was expected.


def _object_id(value: object) -> ObjectId:
    try:
        text = value if isinstance(value, str) else ""
        return ObjectId.parse(text) if ObjectId.is_plain(text) else ObjectId.parse_text(*text.split("?", 1))
    except InvalidInput as error:
        raise PydanticCustomError("expected", "an object id") from error


def _bucket_id(value: object) -> str:
    try:
        return parse_bucket_id(value if isinstance(value, str) else "")
    except InvalidInput as error:
        raise PydanticCustomError("expected", "family:index") from error


def _true(value: object) -> bool:
    """Literal[True] would take 1 as well, and this one word removes every object."""
    if value is not True:
        raise PydanticCustomError("expected", "true")
    return True


_ObjectId = Annotated[ObjectId, PlainValidator(_object_id), WithJsonSchema(OBJECT_ID_SCHEMA)]
_BucketId = Annotated[str, PlainValidator(_bucket_id), WithJsonSchema(BUCKET_ID_SCHEMA)]
_True = Annotated[bool, PlainValidator(_true), WithJsonSchema({"type": "boolean", "const": True})]

_CHECK = "true to refuse what the catalog does not have, or false"


class EmptyBody(BaseModel):
    """No fields. The base of the others: unknown fields are refused, and values are not converted."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class WorkerBody(EmptyBody):
    """The worker to serve as."""

    worker_id: int = Field(
        alias="workerId", ge=0, le=MAX_WORKER_ID, description=f"a whole number from 0 to {MAX_WORKER_ID}"
    )
    check: bool = Field(default=False, description=_CHECK)


class BucketsBody(EmptyBody):
    """The buckets to serve."""

    buckets: Annotated[list[_BucketId], Field(min_length=1)] | SkipJsonSchema[None] = Field(
        default=None, description="a list of bucket ids, or no such field for all of the worker"
    )
    check: bool = Field(default=False, description=_CHECK)


class ToggleBody(EmptyBody):
    """Whether to turn something on."""

    on: bool = Field(description="true or false")


class IdsBody(EmptyBody):
    """Some objects."""

    ids: list[_ObjectId] = Field(
        min_length=1, max_length=MAX_IDS, description=f"a list of 1 to {MAX_IDS} object ids"
    )

    @property
    def unique(self) -> tuple[ObjectId, ...]:
        """Each id once, in the order given."""
        return tuple(dict.fromkeys(self.ids))


class BucketBody(EmptyBody):
    """The objects of one bucket."""

    bucket: _BucketId = Field(description="family:index")


class AllBody(EmptyBody):
    """All objects."""

    all: _True = Field(description="true")


PURGE_BODIES: Mapping[str, type[EmptyBody]] = {"ids": IdsBody, "all": AllBody}
WARMING_BODIES: Mapping[str, type[EmptyBody]] = {"ids": IdsBody, "bucket": BucketBody, "all": AllBody}
"""By the one field that each has."""


# Validation, and its error messages.

_Model = TypeVar("_Model", bound=EmptyBody)


def _validate_one_of(bodies: Mapping[str, type[EmptyBody]], body: Any) -> EmptyBody:
    if isinstance(body, dict) and len(body) == 1:
        (name,) = body
        if name in bodies:
            return _validate(bodies[name], body)
    got = list(body) if isinstance(body, dict) else body
    raise _malformed("body", f"exactly one of {', '.join(bodies)}", got)


def _validate(model: type[_Model], body: Any) -> _Model:
    try:
        return model.model_validate(body)
    except ValidationError as error:
        raise _explain(model, error.errors(include_url=False)[0]) from error


def _explain(model: type[EmptyBody], error: ErrorDetails) -> HttpError:
    fields = {field.alias or name: field.description or "" for name, field in model.model_fields.items()}
    name = str(error["loc"][0]) if error["loc"] else ""
    if not name:
        return _malformed("body", "a JSON object", error["input"])
    if error["type"] == "extra_forbidden":
        return _malformed("body", f"only the fields {', '.join(fields)}" if fields else "no fields", name)
    if error["type"] == "missing":
        return HttpError(400, f"{name}: expected {fields[name]}, got nothing", "malformed_request")
    indexes = [part for part in error["loc"] if isinstance(part, int)]
    place = name + "".join(f"[{index}]" for index in indexes)
    expected = error["msg"] if error["type"] == "expected" else fields[name]
    return _malformed(place, expected, error["input"])


def _malformed(place: str, expected: str, got: Any) -> HttpError:
    return HttpError(400, f"{place}: expected {expected}, got {_shown(got)}", "malformed_request")


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "a JSON object"
    if isinstance(value, list):
        short = len(value) <= 3 and not any(isinstance(item, dict | list) for item in value)
        return f"[{', '.join(map(_shown, value))}]" if short else f"a list of {len(value)}"
    text = json.dumps(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}…"
