"""`distributor import-config`: converts the existing node's configuration to our settings.

The file is read as the existing node reads it, including its environment variables and its YAML version.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from distributor_node.services.evictor.node_import import FILE_NAME
from distributor_node.shared.domain.errors import ConfigurationError
from distributor_node.shared.settings.load import check_settings
from distributor_node.shared.settings.model import MIN_SECRET_LENGTH, CatalogSettings
from distributor_node.shared.settings.sizes import format_size, parse_size

_HEAD = """\
# Written by `distributor import-config` from {file}.
# One process: distributor standalone --config THIS_FILE. For separate services, add state_store.url (redis://…) and
# job_queue.url (amqp://…). Storage nodes at private addresses are not used: if yours have such addresses, change
# catalog.refuse_private_sources. All settings: docs/configuration.md.
"""


def import_configuration(
    file: Path | None, environment: Mapping[str, str], *, accept_query_node: bool = False
) -> tuple[str, list[str]]:
    """Return our settings as YAML, and remarks for the operator. Raises ConfigurationError if they are invalid.

    `file`: None if the existing node is configured by the environment alone. `accept_query_node`: the address of a
    query node is used as the squid's if no squid is named.
    """
    folder = (file if file is not None else Path("file")).resolve().parent
    translation = translate(read_existing(file, environment), folder, accept_query_node=accept_query_node)
    check_settings(translation.settings)
    text = yaml.safe_dump(translation.settings, sort_keys=False, allow_unicode=True)
    remarks = [f"{name} {remark}" for name, remark in translation.remarks.items()]
    return _HEAD.format(file="the environment" if file is None else file.name) + text, remarks


# The existing node's configuration: a YAML or JSON file, overridden by the environment.

PREFIX = "JOYSTREAM_DISTRIBUTOR__"
UNSET = frozenset({"off", "null", "undefined"})
"""Values of variables that remove a setting."""
_TEXTS = frozenset(
    {
        "id", "endpoints.storageSquid", "endpoints.queryNode", "endpoints.joystreamNodeWs", "directories.assets",
        "directories.cacheState", "operatorApi.hmacSecret", "logs.console.level",
    }
)  # fmt: skip


def read_existing(file: Path | None, environment: Mapping[str, str]) -> dict[str, Any]:
    """Return names and values, nested. Raises ConfigurationError for an invalid file.

    A variable such as JOYSTREAM_DISTRIBUTOR__LIMITS__MAX_CACHED_ITEM_SIZE overrides `limits.maxCachedItemSize`. Its
    value is JSON. It is plain text if it is not valid JSON, or if the setting is a text. UNSET removes the setting.
    """
    document = {} if file is None else _document(file)
    if not isinstance(document, dict):
        raise ConfigurationError(
            f"{file}: expected names and values at the top level, got {type(document).__name__}"
        )
    for name in sorted(environment):
        if name.startswith(PREFIX):
            path = [_camel_case(part) for part in name.removeprefix(PREFIX).split("__")]
            _override(document, path, environment[name], name)
    return document


def _document(file: Path) -> Any:
    """Try JSON first: valid JSON may be invalid YAML, which has no tabs."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigurationError(f"{file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{file} cannot be read: {error}") from error
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        if file.suffix == ".json":
            raise ConfigurationError(f"{file} is not valid JSON: {error}") from error
    try:
        return read_yaml(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigurationError(f"{file} is neither YAML nor JSON: {error}") from error


def _override(document: dict[str, Any], path: list[str], text: str, variable: str) -> None:
    if not all(path):
        raise ConfigurationError(f"{variable}: expected the name of a setting after {PREFIX}")
    section = document
    for part in path[:-1]:
        child = section.get(part)
        if not isinstance(child, dict):
            if text in UNSET:
                return
            child = section[part] = {}
        section = child
    if text in UNSET:
        section.pop(path[-1], None)
    else:
        section[path[-1]] = text if ".".join(path) in _TEXTS else _value(text)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _camel_case(part: str) -> str:
    first, *others = part.lower().split("_")
    return first + "".join(word.capitalize() for word in others)


# YAML 1.2, as the existing node reads it. PyYAML reads 1.1, in which fewer plain words are text: in 1.2, `0:1` is text
# and not a number to base 60, and so are `off`, `no` and dates.

_INTEGER = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", re.ASCII)
_NUMBER = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", re.ASCII)
_WORDS: dict[str, bool | None] = {
    "": None, "~": None, "null": None, "Null": None, "NULL": None,
    "true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False,
}  # fmt: skip
_PLAIN = "tag:yaml.org,2002:plain"


def read_yaml(text: str) -> Any:
    """Parse one document. Raises yaml.YAMLError, ValueError."""
    return yaml.load(text, Loader=_CoreLoader)  # noqa: S506 - a SafeLoader with fewer types


class _CoreLoader(yaml.SafeLoader):
    """Scalars by the core schema (YAML 1.2.2, section 10.3.2), without infinity and NaN."""

    yaml_implicit_resolvers: dict[str, Any] = {None: [(_PLAIN, re.compile(""))]}  # type: ignore[dict-item]  # noqa: RUF012


def _plain(_: yaml.SafeLoader, node: yaml.ScalarNode) -> Any:
    text = node.value
    if text in _WORDS:
        return _WORDS[text]
    if _INTEGER.fullmatch(text):
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
    return float(text) if _NUMBER.fullmatch(text) else text


_CoreLoader.add_constructor(_PLAIN, _plain)


# Translation of each setting


_MIN_ASSIGNMENT_INTERVAL = 3600  # seconds
_LEVELS = {
    "error": "error", "warn": "warning", "info": "info", "http": "info", "verbose": "debug", "debug": "debug",
    "silly": "debug",
}  # fmt: skip
_EXPECTED = (
    "id", "endpoints.storageSquid", "directories.assets", "limits.storage", "publicApi.port", "buckets", "workerId"
)  # fmt: skip
_NO_EQUIVALENT = {
    "limits.pendingDownloadTimeoutSec": "a download has no time limit while it progresses: see fetch.stall_timeout and"
    " fetch.minimum_rate",
    "limits.dataObjectSourceByObjectIdTTL": "an object's sources are cached with its description:"
    " see catalog.positive_ttl",
    "intervals.saveCacheState": "there is no such file: the state is on the volume and in the state store",
    "logs.file": "logs go to standard error, one JSON object per line",
    "keys": "it signs chain transactions; keep the existing CLI for `leader:*` and `operator:*`",
    "logs.elastic": "logs go to standard error, one JSON object per line, from which a log shipper can read them",
}


@dataclass(slots=True)
class Translation:
    """The result, filled setting by setting."""

    settings: dict[str, Any] = field(default_factory=dict)  # ours, nested as in the file
    remarks: dict[str, str] = field(default_factory=dict)  # by the name of the existing node's setting

    def put(self, path: str, value: Any) -> None:
        *sections, name = path.split(".")
        target = self.settings
        for section in sections:
            target = target.setdefault(section, {})
        target[name] = value


def translate(document: dict[str, Any], folder: Path, *, accept_query_node: bool = False) -> Translation:
    """Translate all settings. `folder`: of the file, to which its directories are relative.

    `accept_query_node`: see `_choose_squid`. Raises ConfigurationError for a value that is invalid for the existing
    node too, and for a document in which nothing is known.
    """
    translation = Translation()
    translation.put("catalog.kind", "joystream")
    translation.put("catalog.refuse_private_sources", True)
    leaves = [(name, value) for name, value in _leaves(document, "") if value is not None]
    if not any(name in _TRANSLATORS for name, _ in leaves):
        raise ConfigurationError(
            "no setting of an existing node: expected at least one of "
            + ", ".join(_EXPECTED)
            + f"; got {', '.join(sorted({name for name, _ in leaves})[:10]) or 'nothing'}"
        )
    for name, value in leaves:
        translator = _TRANSLATORS.get(name)
        if translator is not None:
            try:
                translator(translation, value, folder)
            except (ValueError, TypeError, OverflowError) as error:
                raise ConfigurationError(f"{name}: {error}") from error
        elif (reason := _no_equivalent(name)) is not None:
            translation.remarks[name] = f"has no equivalent: {reason}"
        else:
            translation.remarks[name] = "is unknown, and has no equivalent"
    if "buckets" not in translation.settings and "worker_id" not in translation.settings:
        translation.remarks["workerId"] = (
            "is missing, and so are buckets: the node will serve everything that the squid lists"
        )
    _choose_squid(translation, dict(leaves), accept_query_node=accept_query_node)
    _fit_cached_item(translation)
    return translation


def _leaves(value: Any, path: str) -> list[tuple[str, Any]]:
    """Return settings by their dotted names. A section without an equivalent counts as one setting."""
    if isinstance(value, dict) and path not in _NO_EQUIVALENT:
        return [
            leaf for name, child in value.items() for leaf in _leaves(child, f"{path}.{name}".lstrip("."))
        ]
    return [(path, value)]


def _no_equivalent(name: str) -> str | None:
    return next((reason for known, reason in _NO_EQUIVALENT.items() if name == known), None)


def _choose_squid(translation: Translation, values: dict[str, Any], *, accept_query_node: bool) -> None:
    """Use a query node's address only if no squid is named and the operator says that a squid answers there."""
    query_node = values.get("endpoints.queryNode")
    named = "endpoints.storageSquid" in values
    if query_node is not None and not named and accept_query_node:
        translation.put("catalog.squid", _text(query_node))
        translation.remarks["endpoints.queryNode"] = "is used as catalog.squid, as --accept-query-node says"
    elif query_node is not None:
        translation.remarks["endpoints.queryNode"] = "is not used: a query node speaks another schema; " + (
            "endpoints.storageSquid is used" if named else "name your Storage-Squid in endpoints.storageSquid"
        )
    if not named and not (query_node is not None and accept_query_node):
        translation.remarks["endpoints.storageSquid"] = (
            f"is missing: catalog.squid keeps its default, {CatalogSettings.model_fields['squid'].default}"
        )


def _fit_cached_item(translation: Translation) -> None:
    storage = translation.settings.get("storage", {})
    largest, limit = storage.get("max_cached_item"), storage.get("limit")
    if largest is not None and limit is not None and parse_size(largest) > parse_size(limit):
        del storage["max_cached_item"]
        translation.remarks["limits.maxCachedItemSize"] = "is omitted, because it is above limits.storage"


Translator = Callable[[Translation, Any, Path], None]


def _to(path: str, convert: Callable[[Any], Any]) -> Translator:
    def translate_one(translation: Translation, value: Any, _: Path) -> None:
        if value is not None:
            translation.put(path, convert(value))

    return translate_one


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"expected text, got {value!r}")
    return value


def _name(value: Any) -> str:
    return _text(str(value) if isinstance(value, int) else value)


def _number(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"expected a number, got {value!r}")
    number = float(value)
    if number < 0 or number != int(number):
        raise ValueError(f"expected a whole number of at least 0, got {value!r}")
    return int(number)


def _at_least_one(value: Any) -> int:
    return max(1, _number(value))


def _size(value: Any) -> str:
    return format_size(parse_size(value))


def _buckets(translation: Translation, value: Any, _: Path) -> None:
    if value is None or value == "all":
        return  # all buckets of the worker
    if not isinstance(value, list) or not all(isinstance(bucket, str) for bucket in value):
        raise ValueError(f"expected a list of bucket ids, got {value!r}")
    translation.put("buckets", value)


def _assets(translation: Translation, value: Any, folder: Path) -> None:
    assets = str(folder / _text(value))
    translation.put("storage.path", assets)
    translation.put("storage.import_assets", assets)


def _cache_state(translation: Translation, value: Any, folder: Path) -> None:
    translation.put("storage.import_cache_state", str(folder / _text(value) / FILE_NAME))


def _downloads(translation: Translation, value: Any, _: Path) -> None:
    requested = _at_least_one(value)
    translation.put("fetch.concurrency", min(requested, 256))
    if requested > 256:
        translation.remarks["limits.maxConcurrentStorageNodeDownloads"] = (
            "is set to 256, the maximum of one fetcher; start more fetchers for more downloads"
        )


def _timeout(translation: Translation, value: Any, _: Path) -> None:
    translation.put("fetch.first_byte_timeout", max(1, _number(value)) / 1000)


def _clean_up(translation: Translation, value: Any, _: Path) -> None:
    seconds = _at_least_one(value)
    translation.put("evictor.assignment_interval", max(seconds, _MIN_ASSIGNMENT_INTERVAL))
    if seconds < _MIN_ASSIGNMENT_INTERVAL:
        translation.remarks["intervals.cacheCleanup"] = (
            f"is set to {_MIN_ASSIGNMENT_INTERVAL} s, because the query of the whole list is expensive for the squid"
        )


def _level(translation: Translation, value: Any, _: Path) -> None:
    level = _LEVELS.get(_text(value).lower())
    if level is not None:
        translation.put("log.level", level)
    elif value != "off":
        raise ValueError(f"expected one of {', '.join(_LEVELS)}, off, got {value!r}")


def _secret(translation: Translation, value: Any, _: Path) -> None:
    secret = _text(value)
    if len(secret) < MIN_SECRET_LENGTH:
        translation.remarks["operatorApi.hmacSecret"] = (
            f"is omitted, and the operator API is off: expected at least {MIN_SECRET_LENGTH} characters,"
            f" got {len(secret)}"
        )
        return
    translation.put("operator_api.secret", secret)
    translation.remarks["operatorApi.hmacSecret"] = "is part of the output: keep the output secret"
    translation.remarks["operatorApi.port"] = "is open on 127.0.0.1 only: see operator_api.host"


def _query_node(_translation: Translation, value: Any, _folder: Path) -> None:
    """Check the value. `_choose_squid` decides whether it is used."""
    _text(value)


def _ignored(_translation: Translation, _value: Any, _folder: Path) -> None:
    """Accept a setting that needs no translation."""


_TRANSLATORS: dict[str, Translator] = {
    "id": _to("id", _name),
    "endpoints.storageSquid": _to("catalog.squid", _text),
    "endpoints.queryNode": _query_node,
    "endpoints.joystreamNodeWs": _to("catalog.chain", _text),
    "directories.assets": _assets,
    "directories.cacheState": _cache_state,
    "limits.storage": _to("storage.limit", _size),
    "limits.maxConcurrentStorageNodeDownloads": _downloads,
    "limits.maxConcurrentOutboundConnections": _to("public_api.max_proxied", _at_least_one),
    "limits.outboundRequestsTimeoutMs": _timeout,
    "limits.maxCachedItemSize": _to("storage.max_cached_item", _size),
    "limits.queryNodeCacheTTL": _to("catalog.positive_ttl", _at_least_one),
    "intervals.checkStorageNodeResponseTimes": _to("sources.probe_interval", _at_least_one),
    "intervals.cacheCleanup": _clean_up,
    "publicApi.port": _to("public_api.port", _number),
    "operatorApi.port": _to("operator_api.port", _number),
    "operatorApi.hmacSecret": _secret,
    "buckets": _buckets,
    "workerId": _to("worker_id", _number),
    "logs.console.level": _level,
    "logs.console": _ignored,
}
