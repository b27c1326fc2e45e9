"""Fault injection for a storage node: rules that match requests, and the faults they cause.

Values are immutable. They are checked when they are made, from Python or JSON, and raise ValueError.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from email.utils import formatdate
from http import HTTPStatus
from typing import Any, get_args, get_type_hints

from distributor_node.services.demo.answers import Response, error_response
from distributor_node.services.demo.objects import BytesContent

HeaderOverrides = tuple[tuple[str, str | None], ...]
_LIMITS = {"bytes_per_second": 1, "drip_bytes_per_second": 1, "nth": 1, "first": 1, "status": 100}
_MAY_BE_NEGATIVE = frozenset({"content_length_delta", "body_delta"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """The faults of one response; by default none. Times in seconds, sizes and positions in bytes.

    Positions named `…_after` count body bytes of the response. Positions of `flip_…` count from the start of the
    object, so that a ranged response is corrupt at the same place as a whole one.
    """

    latency_before_headers: float = 0.0
    latency_before_body: float = 0.0
    bytes_per_second: int | None = None  # evenly: a chunk every 20 ms, or byte by byte at very low rates
    drip_bytes_per_second: int | None = None  # likewise, from drip_after on
    drip_after: int = 0
    cut_after: int | None = None  # close the connection after so many body bytes
    cut_by_reset: bool = False  # close it by a TCP reset: the peer may lose what it has not read
    flip_byte_at: int | None = None  # one corrupt byte
    flip_bytes_from: int | None = None  # every byte is corrupt from here on
    content_length_delta: int = 0  # Content-Length announces so many bytes more or fewer
    body_delta: int = 0  # send so many bytes more (zeros) or fewer; equal to content_length_delta: consistent
    endless_body: bool = False  # endless zeros after the object, without Content-Length
    hang_before_headers: bool = False  # send nothing until the client closes
    hang_after: int | None = None  # send so many body bytes, then nothing until the client closes
    status: int | None = None  # respond with this status and a short JSON body
    redirect_to: str | None = None  # respond 302 (or `status`) with this Location
    gzip: bool = False  # Content-Encoding: gzip, although the client does not accept it
    omit_content_length: bool = False  # the body ends with the connection, RFC 9112 section 6.3 case 8
    chunked: bool = False  # send the body in chunks, without Content-Length
    ignore_range: bool = False  # respond 200 with the whole object
    close_reused_connection: bool = False  # close without a response if the connection was used before
    replaces_object: bool = (
        False  # as this response begins, the object becomes the node's `replacements` entry
    )
    headers: HeaderOverrides = ()  # set a header of the response, or remove it (None)

    def __post_init__(self) -> None:
        _check(self)
        if self.redirect_to is not None and self.status is not None and not 300 <= self.status < 400:
            raise ValueError(f"redirect_to needs a status of 3xx, got {self.status}")
        if self.status is not None and self.status > 599:
            raise ValueError(f"status must be at most 599, got {self.status}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """Which requests a rule applies to. Fields that are not set match all.

    `nth`, `first` and `after` count the requests that match all other fields, from 1: exactly the n-th, the first n,
    all but the first n.
    """

    object_id: str | None = None
    method: str | None = None
    endpoint: str | None = None  # "files" or "version"
    ranged: bool | None = None  # with or without a Range header
    nth: int | None = None
    first: int | None = None
    after: int | None = None

    def __post_init__(self) -> None:
        _check(self)
        if self.endpoint not in (None, "files", "version"):
            raise ValueError(f"endpoint must be files or version, got {self.endpoint!r}")
        if self.method not in (None, "GET", "HEAD"):
            raise ValueError(f"method must be GET or HEAD, got {self.method!r}")

    def matches(self, method: str, endpoint: str, object_id: str | None, ranged: bool) -> bool:
        """Whether this rule counts the request."""
        return (
            self.object_id in (None, object_id)
            and self.method in (None, method)
            and self.endpoint in (None, endpoint)
            and self.ranged in (None, ranged)
        )

    def selects(self, count: int) -> bool:
        """Whether the rule applies to the `count`-th matching request."""
        return (
            (self.nth is None or count == self.nth)
            and (self.first is None or count <= self.first)
            and (self.after is None or count > self.after)
        )


@dataclass(frozen=True, slots=True)
class Rule:
    """A fault for the requests that match."""

    fault: Fault
    match: Match = field(default_factory=Match)

    def to_json(self) -> dict[str, Any]:
        """Return the rule as JSON, without fields that have their default value."""
        return {"match": _to_json(self.match), "fault": _to_json(self.fault)}

    @classmethod
    def from_json(cls, document: object) -> Rule:
        """Parse `{"match": {…}, "fault": {…}}`; `seen` is ignored. Raises ValueError."""
        if not isinstance(document, Mapping) or "fault" not in document:
            raise ValueError('rule: expected an object {"match": {…}, "fault": {…}}')
        if unknown := set(document) - {"match", "fault", "seen"}:
            raise ValueError(f"a rule has no {', '.join(sorted(map(str, unknown)))}")
        fault = Fault(**_arguments(Fault, document["fault"]))
        return cls(fault, Match(**_arguments(Match, document.get("match", {}))))


def _arguments(kind: type[Fault] | type[Match], document: object) -> dict[str, Any]:
    label = kind.__name__.lower()
    if not isinstance(document, Mapping):
        raise ValueError(f"{label} must be an object")
    if unknown := set(document) - {item.name for item in fields(kind)}:
        raise ValueError(f"{label} has no {', '.join(sorted(map(str, unknown)))}")
    arguments = dict(document)
    if "headers" in arguments:
        if not isinstance(arguments["headers"], Mapping):
            raise ValueError("headers must be an object of names with text or null")
        arguments["headers"] = tuple(arguments["headers"].items())
    return arguments


def _to_json(value: Fault | Match) -> dict[str, Any]:
    values = {}
    for item in fields(value):
        if (current := getattr(value, item.name)) != item.default:
            values[item.name] = dict(current) if item.name == "headers" else current
    return values


def _check(value: Fault | Match) -> None:
    """Check each field's type against its annotation, and numbers against their minimum."""
    for name, hint in get_type_hints(type(value)).items():
        current = getattr(value, name)
        if name == "headers":
            _check_headers(current)
            continue
        allowed = get_args(hint) or (hint,)
        numeric = isinstance(current, int) and not isinstance(current, bool)
        if type(current) not in allowed and not (float in allowed and numeric):
            names = " or ".join("null" if kind is type(None) else kind.__name__ for kind in allowed)
            raise ValueError(f"{name} must be {names}, got {current!r}")
        if (
            isinstance(current, int | float)
            and name not in _MAY_BE_NEGATIVE
            and not current >= _LIMITS.get(name, 0)
        ):
            raise ValueError(f"{name} must be at least {_LIMITS.get(name, 0)}, got {current}")


def _check_headers(headers: object) -> None:
    if not isinstance(headers, tuple):
        raise ValueError("headers must be a tuple of (name, value) pairs")
    for pair in headers:
        if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str) and pair[0]):
            raise ValueError(f"a header is a pair (name, value), got {pair!r}")
        if pair[1] is not None and not isinstance(pair[1], str):
            raise ValueError(f"the value of header {pair[0]} must be text or null, got {pair[1]!r}")
        if any(character in text for text in pair if text for character in "\r\n"):
            raise ValueError(f"header {pair[0]!r} holds a line break")


# The active rules of one storage node, with the number of requests that each has matched.

_NO_FAULT = Fault()


class FaultRegistry:
    """Holds the rules. The first rule that applies to a request decides; without one there is no fault."""

    def __init__(self) -> None:
        self._rules: list[Rule] = []
        self._counts: list[int] = []

    def add(self, fault: Fault, match: Match | None = None) -> None:
        """Append a rule. Without `match`, it applies to all requests."""
        self._rules.append(Rule(fault, match or Match()))
        self._counts.append(0)

    def replace(self, rules: Iterable[Rule]) -> None:
        """Replace all rules, and set their counts to zero."""
        self._rules = list(rules)
        self._counts = [0] * len(self._rules)

    def clear(self) -> None:
        """Remove all rules. Responses under way keep their faults."""
        self.replace([])

    def fault_for(self, method: str, endpoint: str, object_id: str | None, ranged: bool) -> Fault:
        """Count the request in every rule that it matches, and return the fault of the first rule that applies."""
        decided: Fault | None = None
        for index, rule in enumerate(self._rules):
            if not rule.match.matches(method, endpoint, object_id, ranged):
                continue
            self._counts[index] += 1
            if decided is None and rule.match.selects(self._counts[index]):
                decided = rule.fault
        return decided or _NO_FAULT

    def to_json(self) -> dict[str, Any]:
        """Return the rules as JSON, each with `seen`, the number of requests that it has matched."""
        counted = zip(self._rules, self._counts, strict=True)
        return {"rules": [rule.to_json() | {"seen": seen} for rule, seen in counted]}

    def replace_from_json(self, document: object) -> None:
        """Replace all rules by those of `{"rules": […]}`. Raises ValueError, and changes nothing, if one is invalid."""
        if (
            not isinstance(document, dict)
            or set(document) != {"rules"}
            or not isinstance(document["rules"], list)
        ):
            raise ValueError('faults: expected an object {"rules": […]}')
        self.replace([Rule.from_json(rule) for rule in document["rules"]])


# Applying a fault to a correct response: status, headers, bytes. Pure.

_INVERTED = bytes(value ^ 0xFF for value in range(256))
_PHRASES = {status.value: status.phrase for status in HTTPStatus}


def corrupted(response: Response, fault: Fault) -> Response:
    """Apply the faults that replace the response. `body_chunk` applies those that change single bytes."""
    if fault.redirect_to is not None:
        return Response(fault.status or 302, (("Location", fault.redirect_to),))
    if fault.status is not None:
        return error_response(fault.status, "scripted", "injected fault")
    if fault.ignore_range and response.status == 206:
        kept = tuple(pair for pair in response.headers if pair[0] != "Content-Range")
        response = Response(200, kept, response.content, 0, response.content.size)
    if fault.gzip and response.length:
        packed = gzip.compress(
            response.content.read(response.offset, response.length), compresslevel=1, mtime=0
        )
        headers = (*response.headers, ("Content-Encoding", "gzip"))
        response = Response(response.status, headers, BytesContent(packed), 0, len(packed))
    return response


def render_head(response: Response, fault: Fault, keep_alive: bool) -> bytes:
    """Return the status line and headers as bytes."""
    headers = {"Date": formatdate(usegmt=True), **dict(response.headers)}
    delimited = not (fault.omit_content_length or fault.endless_body or fault.chunked)
    if fault.chunked:
        headers["Transfer-Encoding"] = "chunked"
    if delimited and response.status not in (204, 304):
        headers["Content-Length"] = str(max(0, response.length + fault.content_length_delta))
    headers["Connection"] = "keep-alive" if keep_alive else "close"
    for name, value in fault.headers:
        for known in [known for known in headers if known.lower() == name.lower()]:
            del headers[known]
        if value is not None:
            headers[name] = value
    lines = [f"HTTP/1.1 {response.status} {_PHRASES.get(response.status, 'Unknown')}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def body_chunk(response: Response, fault: Fault, position: int, size: int) -> bytes:
    """Return bytes of the body with the faults applied, and zeros beyond its correct end."""
    available = min(size, max(0, response.length - position))
    start = response.offset + position
    chunk = response.content.read(start, available) if available else b""
    if fault.flip_bytes_from is not None and start + len(chunk) > fault.flip_bytes_from:
        correct = max(0, fault.flip_bytes_from - start)
        chunk = chunk[:correct] + chunk[correct:].translate(_INVERTED)
    if fault.flip_byte_at is not None and 0 <= (at := fault.flip_byte_at - start) < len(chunk):
        chunk = chunk[:at] + bytes([chunk[at] ^ 0xFF]) + chunk[at + 1 :]
    return chunk + bytes(size - len(chunk)) if len(chunk) < size else chunk
