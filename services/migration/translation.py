"""The existing node's settings in our words, and what has no equal here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distributor_node.services.evictor.node_import import FILE_NAME
from distributor_node.shared.domain.errors import ConfigurationError
from distributor_node.shared.settings.model import MIN_SECRET_LENGTH
from distributor_node.shared.settings.sizes import format_size, parse_size

_MIN_ASSIGNMENT_INTERVAL = 3600
_LEVELS = {
    "error": "error", "warn": "warning", "info": "info", "http": "info", "verbose": "debug", "debug": "debug",
    "silly": "debug",
}  # fmt: skip
_NO_EQUIVALENT = {
    "limits.pendingDownloadTimeoutSec": "a download may last as long as it moves: see fetch.stall_timeout and"
    " fetch.minimum_rate",
    "limits.dataObjectSourceByObjectIdTTL": "an object's sources are kept with its description:"
    " see catalog.positive_ttl",
    "intervals.saveCacheState": "there is no such file: the volume is the truth, and the state store its index",
    "logs.file": "logs go to standard error, one JSON object a line",
    "logs.elastic": "logs go to standard error, one JSON object a line; a shipper can take them from there",
}


@dataclass(slots=True)
class Translation:
    """`settings`: ours, nested as in the file. `remarks`: what to know about one of theirs, by its name."""

    settings: dict[str, Any] = field(default_factory=dict)
    remarks: dict[str, str] = field(default_factory=dict)

    def put(self, path: str, value: Any) -> None:
        *sections, name = path.split(".")
        target = self.settings
        for section in sections:
            target = target.setdefault(section, {})
        target[name] = value


def translate(document: dict[str, Any], folder: Path) -> Translation:
    """`folder`: where the file lies; relative directories are below it. ConfigurationError for a value that the
    existing node could not have used either."""
    translation = Translation()
    translation.put("catalog.kind", "joystream")
    translation.put("catalog.refuse_private_sources", True)
    for name, value in _leaves(document, ""):
        translator = _TRANSLATORS.get(name)
        if translator is not None:
            try:
                translator(translation, value, folder)
            except (ValueError, TypeError, OverflowError) as error:
                raise ConfigurationError(f"{name}: {error}") from error
        elif (reason := _no_equivalent(name)) is not None:
            translation.remarks[name] = f"has no equal: {reason}"
        else:
            translation.remarks[name] = "is not known, and has no equal"
    if "buckets" not in translation.settings and "worker_id" not in translation.settings:
        translation.remarks["workerId"] = (
            "is missing, and so are buckets: everything the squid knows will be served"
        )
    _fit_cached_item(translation)
    return translation


def _leaves(value: Any, path: str) -> list[tuple[str, Any]]:
    """Settings by their dotted name; a section whose parts have no meaning one by one is a leaf."""
    if isinstance(value, dict) and path not in _NO_EQUIVALENT:
        return [
            leaf for name, child in value.items() for leaf in _leaves(child, f"{path}.{name}".lstrip("."))
        ]
    return [(path, value)]


def _no_equivalent(name: str) -> str | None:
    return next((reason for known, reason in _NO_EQUIVALENT.items() if name == known), None)


def _fit_cached_item(translation: Translation) -> None:
    storage = translation.settings.get("storage", {})
    largest, limit = storage.get("max_cached_item"), storage.get("limit")
    if largest is not None and limit is not None and parse_size(largest) > parse_size(limit):
        del storage["max_cached_item"]
        translation.remarks["limits.maxCachedItemSize"] = "left out: it is above limits.storage"


Translator = Callable[[Translation, Any, Path], None]


def _to(path: str, convert: Callable[[Any], Any]) -> Translator:
    def translate_one(translation: Translation, value: Any, _: Path) -> None:
        if value is not None:
            translation.put(path, convert(value))

    return translate_one


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("want text")
    return value


def _name(value: Any) -> str:
    return _text(str(value) if isinstance(value, int) else value)


def _number(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError("want a number")
    number = float(value)
    if number < 0 or number != int(number):
        raise ValueError("want a whole number, not below 0")
    return int(number)


def _at_least_one(value: Any) -> int:
    return max(1, _number(value))


def _size(value: Any) -> str:
    return format_size(parse_size(value))


def _buckets(translation: Translation, value: Any, _: Path) -> None:
    if value is None or value == "all":
        return  # all buckets of the worker
    if not isinstance(value, list) or not all(isinstance(bucket, str) for bucket in value):
        raise ValueError("want a list of bucket ids")
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
            "is 256 here, for each fetcher; add fetchers for more"
        )


def _timeout(translation: Translation, value: Any, _: Path) -> None:
    translation.put("fetch.first_byte_timeout", max(1, _number(value)) / 1000)


def _clean_up(translation: Translation, value: Any, _: Path) -> None:
    seconds = _at_least_one(value)
    translation.put("evictor.duty_interval", max(seconds, _MIN_ASSIGNMENT_INTERVAL))
    if seconds < _MIN_ASSIGNMENT_INTERVAL:
        translation.remarks["intervals.cacheCleanup"] = (
            f"is {_MIN_ASSIGNMENT_INTERVAL} s here: the whole list is asked for, which costs the squid dearly"
        )


def _level(translation: Translation, value: Any, _: Path) -> None:
    level = _LEVELS.get(_text(value).lower())
    if level is not None:
        translation.put("log.level", level)
    elif value != "off":
        raise ValueError(f"no such level: {value}")


def _secret(translation: Translation, value: Any, _: Path) -> None:
    secret = _text(value)
    if len(secret) < MIN_SECRET_LENGTH:
        translation.remarks["operatorApi.hmacSecret"] = (
            f"left out, and the operator API with it: want at least {MIN_SECRET_LENGTH} characters"
        )
        return
    translation.put("operator_api.secret", secret)
    translation.remarks["operatorApi.hmacSecret"] = "is in what is printed: keep that to yourself"
    translation.remarks["operatorApi.port"] = "is listened to on 127.0.0.1 only: see operator_api.host"


def _ignored(_translation: Translation, _value: Any, _folder: Path) -> None:
    """Says nothing that ours needs to be told."""


_TRANSLATORS: dict[str, Translator] = {
    "id": _to("id", _name),
    "endpoints.storageSquid": _to("catalog.squid", _text),
    "endpoints.queryNode": _to("catalog.squid", _text),
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
