"""Reads the settings from file and environment, and explains which are wrong."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from distributor_node.shared.domain.errors import ConfigurationError
from distributor_node.shared.settings.environment import GivenByEnvironment, read_environment
from distributor_node.shared.settings.model import Settings
from distributor_node.shared.settings.names import explain

_MAX_FILE = 1024 * 1024  # bytes


def load_settings(file: Path | None = None, environment: Mapping[str, str] | None = None) -> Settings:
    """Defaults, then `file` (YAML or JSON), then the environment (default: that of this process).

    Raises ConfigurationError with a line for each wrong setting, without the values of secrets.
    """
    from_file = _read_file(file) if file is not None else {}
    given = read_environment(os.environ if environment is None else environment)
    settings = _validate(_merge(from_file, given.fields), given)
    settings.remember_file(file)
    return settings


def check_settings(fields: Mapping[str, Any]) -> None:
    """Raise ConfigurationError unless these are valid settings by themselves, without the environment."""
    _validate(fields, GivenByEnvironment())


def _validate(fields: Mapping[str, Any], environment: GivenByEnvironment) -> Settings:
    problems = list(environment.problems)
    try:
        settings = Settings(**fields)
    except ValidationError as error:
        problems += explain(error, environment.variables)
        raise ConfigurationError("\n".join(problems)) from None
    problems += settings.problems_of_sizes()
    if problems:
        raise ConfigurationError("\n".join(problems))
    return settings


def _merge(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return both. Where both have a value, that of `over`."""
    merged = dict(under)
    for name, value in over.items():
        below = merged.get(name)
        merged[name] = _merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


# The settings file


def _read_file(file: Path) -> dict[str, Any]:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise ConfigurationError(f"settings file {file} cannot be read: {error.strerror}") from None
    if len(content) > _MAX_FILE:
        raise ConfigurationError(
            f"settings file {file}: expected at most {_MAX_FILE} bytes, got {len(content)}"
        )
    try:
        fields = yaml.load(content.decode(), _UniqueKeys)  # noqa: S506 - a subclass of SafeLoader
    except UnicodeDecodeError:
        raise ConfigurationError(f"settings file {file}: expected UTF-8") from None
    except _UnusableNode as error:
        raise ConfigurationError(f"settings file {file}, {error}") from None
    except yaml.YAMLError as error:
        # The library's own message shows the text around the error, which may be a secret.
        raise ConfigurationError(f"settings file {file}: not valid YAML{_place(error)}") from None
    except (RecursionError, ValueError):
        raise ConfigurationError(f"settings file {file}: not valid YAML") from None
    if fields is None:
        return {}
    if not isinstance(fields, dict):
        raise ConfigurationError(
            f"settings file {file}: expected names and values at the top level, got {type(fields).__name__}"
        )
    return fields


class _UnusableNode(Exception):
    """Valid YAML that settings cannot be made of."""

    def __init__(self, node: yaml.Node, problem: str) -> None:
        super().__init__(f"line {node.start_mark.line + 1}: {problem}")


class _UniqueKeys(yaml.SafeLoader):
    """Refuses what YAML accepts and settings cannot mean: a name given twice, names that are not text."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            if key.tag != "tag:yaml.org,2002:str":
                raise _UnusableNode(key, "expected a name that is text")
            if key.value in seen:
                raise _UnusableNode(key, f"{key.value} is given twice")
            seen.add(key.value)
        return node


def _place(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    return "" if mark is None else f" (line {mark.line + 1}, column {mark.column + 1})"
