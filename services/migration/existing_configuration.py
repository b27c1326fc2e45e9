"""The existing node's configuration as it would read it: a YAML or JSON file, with the environment on top."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from services.migration.yaml_core import read_yaml
from shared.domain.errors import ConfigurationError

PREFIX = "JOYSTREAM_DISTRIBUTOR__"
OFF = "off"
_TEXTS = frozenset(
    {
        "id", "endpoints.storageSquid", "endpoints.queryNode", "endpoints.joystreamNodeWs", "directories.assets",
        "directories.cacheState", "operatorApi.hmacSecret", "logs.console.level",
    }
)  # fmt: skip


def read_existing(file: Path, environment: Mapping[str, str]) -> dict[str, Any]:
    """Names and values, nested. ConfigurationError if the file cannot be read as that.

    A variable such as JOYSTREAM_DISTRIBUTOR__LIMITS__MAX_CACHED_ITEM_SIZE overrides `limits.maxCachedItemSize`. Its
    value is JSON, or plain text where it is none, or where the setting is a text; `off` takes the setting out.
    """
    document = _document(file)
    if not isinstance(document, dict):
        raise ConfigurationError(f"{file}: want names and values at the top level")
    for name in sorted(environment):
        if name.startswith(PREFIX):
            path = [_camel_case(part) for part in name.removeprefix(PREFIX).split("__")]
            _override(document, path, environment[name], name)
    return document


def _document(file: Path) -> Any:
    """JSON first: what is JSON need not be YAML, which knows no tabs."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{file} cannot be read: {error}") from error
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        if file.suffix == ".json":
            raise ConfigurationError(f"{file} is no JSON: {error}") from error
    try:
        return read_yaml(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigurationError(f"{file} is neither YAML nor JSON: {error}") from error


def _override(document: dict[str, Any], path: list[str], text: str, variable: str) -> None:
    if not all(path):
        raise ConfigurationError(f"{variable} names no setting")
    section = document
    for part in path[:-1]:
        child = section.get(part)
        if not isinstance(child, dict):
            if text == OFF:
                return
            child = section[part] = {}
        section = child
    if text == OFF:
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
