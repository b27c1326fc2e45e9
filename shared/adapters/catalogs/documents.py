"""What catalogs read: a strict and fast reader of YAML and JSON documents, and failed requests to catalog servers.

The reader takes 100,000 objects in seconds.

PyYAML's loaders take five times as long as the parser they use. They also guess types (an unquoted `0:1` becomes a
number), accept equal keys, and drop the line numbers. The values here are mappings, lists, text, integers, booleans
and null, and each mapping has its line number.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import yaml
from websockets.exceptions import WebSocketException

from distributor_node.shared.domain.errors import CatalogUnavailable, InvalidInput

_LOADER: type[Any] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_INTEGER = re.compile(r"-?(?:0|[1-9][0-9]{0,18})", re.ASCII)
_WORDS = {"true": True, "True": True, "false": False, "False": False, "null": None, "~": None, "": None}
_MAX_DEPTH = 20


class LocatedMapping(dict[str, Any]):
    """A mapping that knows where it stands in the document."""

    line: int = 0  # the line it begins at, counted from 1; 0 if unknown (JSON)


def describe(value: Any) -> str:
    """Return a short text for error messages: `a mapping`, `a list`, `nothing`, or the value itself."""
    match value:
        case None:
            return "nothing"
        case dict():
            return "a mapping"
        case list():
            return "a list"
        case bool():
            return str(value).lower()
        case _:
            return repr(value)[:40]


def read_json(text: str) -> Any:
    """Parse JSON. Raises InvalidInput, with the line, for invalid JSON and for equal keys in one mapping."""
    try:
        return json.loads(text, object_pairs_hook=_unique_keys)
    except json.JSONDecodeError as error:
        raise InvalidInput(f"line {error.lineno}: invalid JSON: {error.msg}") from error
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"invalid JSON: {error}") from error


def _unique_keys(pairs: list[tuple[str, Any]]) -> LocatedMapping:
    mapping = LocatedMapping(pairs)
    if len(mapping) != len(pairs):
        raise InvalidInput("equal keys in one mapping: " + ", ".join(sorted(key for key, _ in pairs))[:200])
    return mapping


def read_yaml(text: str) -> Any:
    """Parse one YAML document. Raises InvalidInput, with the line, also for equal keys, tags and aliases."""
    builder = _Builder()
    try:
        for event in yaml.parse(text, Loader=_LOADER):
            builder.add(event)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 0
        raise InvalidInput(f"line {line}: invalid YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise InvalidInput(f"invalid YAML: {error}") from error
    return builder.document()


class _Builder:
    """Builds the document from the parser's events."""

    def __init__(self) -> None:
        self._documents: list[Any] = []
        self._open: list[LocatedMapping | list[Any]] = []
        self._keys: list[str | None] = []

    def document(self) -> Any:
        if len(self._documents) != 1:
            raise InvalidInput(f"expected one YAML document, got {len(self._documents)}")
        return self._documents[0]

    def add(self, event: yaml.Event) -> None:
        if isinstance(event, yaml.ScalarEvent):
            self._refuse_tag(event)
            self._scalar(event)
        elif isinstance(event, yaml.MappingStartEvent):
            self._refuse_tag(event)
            mapping = LocatedMapping()
            mapping.line = _line(event)
            self._begin(mapping, event)
        elif isinstance(event, yaml.SequenceStartEvent):
            self._refuse_tag(event)
            self._begin([], event)
        elif isinstance(event, (yaml.MappingEndEvent, yaml.SequenceEndEvent)):
            self._keys.pop()
            self._put(self._open.pop(), event)
        elif isinstance(event, yaml.AliasEvent):
            raise InvalidInput(f"line {_line(event)}: aliases are not supported")

    def _begin(self, collection: LocatedMapping | list[Any], event: yaml.Event) -> None:
        if self._awaits_key():
            raise InvalidInput(f"line {_line(event)}: a key must be text")
        if len(self._open) >= _MAX_DEPTH:
            raise InvalidInput(f"line {_line(event)}: nested more than {_MAX_DEPTH} levels deep")
        self._open.append(collection)
        self._keys.append(None)

    def _scalar(self, event: yaml.ScalarEvent) -> None:
        if not self._awaits_key():
            self._put(_plain(event.value) if event.implicit[0] else event.value, event)
            return
        if event.value in self._open[-1]:
            raise InvalidInput(f"line {_line(event)}: {event.value[:40]!r} is given twice in one mapping")
        self._keys[-1] = event.value

    def _put(self, value: Any, event: yaml.Event) -> None:
        if not self._open:
            self._documents.append(value)
            return
        collection = self._open[-1]
        if isinstance(collection, list):
            collection.append(value)
            return
        key = self._keys[-1]
        if key is None:
            raise InvalidInput(f"line {_line(event)}: a key must be text")
        collection[key] = value
        self._keys[-1] = None

    def _awaits_key(self) -> bool:
        return bool(self._open) and isinstance(self._open[-1], LocatedMapping) and self._keys[-1] is None

    def _refuse_tag(self, event: Any) -> None:
        if event.tag is not None:
            raise InvalidInput(f"line {_line(event)}: tags are not supported")


def _plain(text: str) -> str | int | bool | None:
    if text in _WORDS:
        return _WORDS[text]
    return int(text) if _INTEGER.fullmatch(text) else text


def _line(event: yaml.Event) -> int:
    return event.start_mark.line + 1 if event.start_mark is not None else 0


_MAX_REASON = 200  # characters of a library's message that are kept


@asynccontextmanager
async def map_catalog_errors(server: str, timeout: float) -> AsyncIterator[None]:
    """Limit the block to `timeout` seconds, and raise CatalogUnavailable for every failure of the request.

    The libraries' exceptions are chained. `server` begins the message, such as `the squid`.
    """
    try:
        async with asyncio.timeout(timeout):
            yield
    except TimeoutError as error:
        raise CatalogUnavailable(f"{server} did not respond within {timeout:g} s") from error
    except (httpx.HTTPError, httpx.InvalidURL, WebSocketException, OSError) as error:
        reason = f"{type(error).__name__} {error}".strip()[:_MAX_REASON]
        raise CatalogUnavailable(f"{server} cannot be reached: {reason}") from error
