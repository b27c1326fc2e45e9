"""The existing node's settings in our words, and what has no equal here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shared.adapters.existing_node import FILE_NAME
from shared.domain.errors import ConfigurationError
from shared.settings.operator_api import LEAST_SECRET
from shared.settings.sizes import format_size, parse_size

_LEAST_DUTY_SECONDS = 3600
_LEVELS = {
    "error": "error", "warn": "warning", "info": "info", "http": "info", "verbose": "debug", "debug": "debug",
    "silly": "debug",
}  # fmt: skip
_NO_EQUAL = {
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
    made = Translation()
    made.put("catalog.kind", "joystream")
    made.put("catalog.refuse_private_sources", True)
    for name, value in _leaves(document, ""):
        translator = _TRANSLATORS.get(name)
        if translator is not None:
            try:
                translator(made, value, folder)
            except (ValueError, TypeError, OverflowError) as error:
                raise ConfigurationError(f"{name}: {error}") from error
        elif (reason := _without_equal(name)) is not None:
            made.remarks[name] = f"has no equal: {reason}"
        else:
            made.remarks[name] = "is not known, and has no equal"
    if "buckets" not in made.settings and "worker_id" not in made.settings:
        made.remarks["workerId"] = "is missing, and so are buckets: everything the squid knows will be served"
    _fit_cached_item(made)
    return made


def _leaves(value: Any, path: str) -> list[tuple[str, Any]]:
    """Settings by their dotted name; a section whose parts have no meaning one by one is a leaf."""
    if isinstance(value, dict) and path not in _NO_EQUAL:
        return [
            leaf for name, below in value.items() for leaf in _leaves(below, f"{path}.{name}".lstrip("."))
        ]
    return [(path, value)]


def _without_equal(name: str) -> str | None:
    return next((reason for known, reason in _NO_EQUAL.items() if name == known), None)


def _fit_cached_item(made: Translation) -> None:
    storage = made.settings.get("storage", {})
    largest, limit = storage.get("max_cached_item"), storage.get("limit")
    if largest is not None and limit is not None and parse_size(largest) > parse_size(limit):
        del storage["max_cached_item"]
        made.remarks["limits.maxCachedItemSize"] = "left out: it is above limits.storage"


Translator = Callable[[Translation, Any, Path], None]


def _to(path: str, convert: Callable[[Any], Any]) -> Translator:
    def translate_one(made: Translation, value: Any, _: Path) -> None:
        if value is not None:
            made.put(path, convert(value))

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


def _buckets(made: Translation, value: Any, _: Path) -> None:
    if value is None or value == "all":
        return  # all buckets of the worker
    if not isinstance(value, list) or not all(isinstance(bucket, str) for bucket in value):
        raise ValueError("want a list of bucket ids")
    made.put("buckets", value)


def _assets(made: Translation, value: Any, folder: Path) -> None:
    assets = str(folder / _text(value))
    made.put("storage.path", assets)
    made.put("storage.import_assets", assets)


def _cache_state(made: Translation, value: Any, folder: Path) -> None:
    made.put("storage.import_cache_state", str(folder / _text(value) / FILE_NAME))


def _downloads(made: Translation, value: Any, _: Path) -> None:
    wanted = _at_least_one(value)
    made.put("fetch.concurrency", min(wanted, 256))
    if wanted > 256:
        made.remarks["limits.maxConcurrentStorageNodeDownloads"] = (
            "is 256 here, for each fetcher; add fetchers for more"
        )


def _timeout(made: Translation, value: Any, _: Path) -> None:
    made.put("fetch.first_byte_timeout", max(1, _number(value)) / 1000)


def _clean_up(made: Translation, value: Any, _: Path) -> None:
    seconds = _at_least_one(value)
    made.put("evictor.duty_interval", max(seconds, _LEAST_DUTY_SECONDS))
    if seconds < _LEAST_DUTY_SECONDS:
        made.remarks["intervals.cacheCleanup"] = (
            f"is {_LEAST_DUTY_SECONDS} s here: the whole list is asked for, which costs the squid dearly"
        )


def _level(made: Translation, value: Any, _: Path) -> None:
    level = _LEVELS.get(_text(value).lower())
    if level is not None:
        made.put("log.level", level)
    elif value != "off":
        raise ValueError(f"no such level: {value}")


def _secret(made: Translation, value: Any, _: Path) -> None:
    secret = _text(value)
    if len(secret) < LEAST_SECRET:
        made.remarks["operatorApi.hmacSecret"] = (
            f"left out, and the operator API with it: want at least {LEAST_SECRET} characters"
        )
        return
    made.put("operator_api.secret", secret)
    made.remarks["operatorApi.hmacSecret"] = "is in what is printed: keep that to yourself"
    made.remarks["operatorApi.port"] = "is listened to on 127.0.0.1 only: see operator_api.host"


def _ignored(_made: Translation, _value: Any, _folder: Path) -> None:
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
