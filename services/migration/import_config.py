"""`distributor import-config`: converts the existing node's configuration to our settings.

The file is read as the existing node reads it, including its environment variables and its YAML version.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from distributor_node.services.migration.translation import translate
from distributor_node.shared.domain.errors import ConfigurationError
from distributor_node.shared.settings.load import check_settings

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
    except (OSError, UnicodeDecodeError) as error:
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
