"""Settings from environment variables: DISTRIBUTOR_ and the path of the setting, such as DISTRIBUTOR_STORAGE__LIMIT.

A secret may be in a file that the variable with the ending _FILE names, as container platforms mount them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic.fields import FieldInfo

from distributor_node.shared.settings.model import Settings
from distributor_node.shared.settings.names import (
    all_settings,
    former_settings,
    group_of,
    is_secret,
    nearest,
    shown,
)

PREFIX = "DISTRIBUTOR_"
FILE_SUFFIX = "_FILE"
_MAX_SECRET_FILE = 64 * 1024  # bytes


def variable_of(path: str) -> str:
    """Return the variable of a setting: storage.limit is DISTRIBUTOR_STORAGE__LIMIT."""
    return PREFIX + path.replace(".", "__").upper()


@dataclass(slots=True)
class GivenByEnvironment:
    """What the environment says about the settings."""

    fields: dict[str, Any] = field(default_factory=dict)  # nested as in a settings file
    variables: dict[str, str] = field(
        default_factory=dict
    )  # by the path of a setting, the variable that gave it
    problems: list[str] = field(default_factory=list)  # one sentence for each wrong variable


def read_environment(environment: Mapping[str, str]) -> GivenByEnvironment:
    """Take the settings from the variables with our prefix, in whatever case. All others are ignored."""
    settings = {**all_settings(), **former_settings()}
    known = {variable_of(path): (path, setting) for path, setting in settings.items()}
    given = GivenByEnvironment()
    for name, text in environment.items():
        upper = name.upper()
        if not upper.startswith(PREFIX):
            continue
        is_file = upper not in known and upper.endswith(FILE_SUFFIX)
        path, setting = known.get(upper.removesuffix(FILE_SUFFIX) if is_file else upper, ("", None))
        if setting is None or (is_file and not is_secret(setting)):
            given.problems.append(_unknown(name, known))
        elif path in given.variables:
            given.problems.append(f"{name}: {path} is given by {given.variables[path]} too")
        else:
            given.variables[path] = name
            try:
                _put(given.fields, path, _read_secret(text) if is_file else _parse(text, setting))
            except ValueError as error:
                given.problems.append(f"{name}: {error}")
    return given


def _unknown(name: str, known: Mapping[str, tuple[str, FieldInfo]]) -> str:
    """Show names alone: the value may be a secret that belongs to another variable."""
    upper = name.upper()
    groups = {variable_of(name) for name, setting in Settings.model_fields.items() if group_of(setting)}
    if upper in groups:
        first = next(variable for variable in known if variable.startswith(f"{upper}__"))
        return f"{name}: expected a variable for each setting of the group, such as {first}"
    files = [variable + FILE_SUFFIX for variable, (_, setting) in known.items() if is_secret(setting)]
    return f"{name}: unknown setting{nearest(upper, [*known, *files], PREFIX)}"


def _parse(text: str, setting: FieldInfo) -> Any:
    """Lists are JSON, or separated by commas. All else is left to the setting's type. Raises ValueError."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("expected UTF-8")
    if not _is_list(setting):
        return text
    stripped = text.strip()
    if stripped.startswith("["):
        try:
            return json.loads(stripped)
        except (ValueError, RecursionError):
            raise ValueError(
                f"expected a JSON list, or values separated by commas, got {shown(text)}"
            ) from None
    if not stripped:
        raise ValueError("expected a JSON list, or values separated by commas, got ''")
    return [item.strip() for item in stripped.split(",")]


def _is_list(setting: FieldInfo) -> bool:
    alternatives = (
        get_args(setting.annotation) if get_origin(setting.annotation) not in (tuple, frozenset) else ()
    )
    return any(get_origin(kind) in (tuple, frozenset) for kind in (setting.annotation, *alternatives))


def _read_secret(path: str) -> str:
    """Return the content of a secret's file without the line break at its end. Raises ValueError, without content."""
    try:
        with Path(path).open("rb") as file:
            content = file.read(_MAX_SECRET_FILE + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a path"
        raise ValueError(f"expected a readable file, got {shown(path)}: {reason}") from None
    if len(content) > _MAX_SECRET_FILE:
        raise ValueError(f"expected a file of at most {_MAX_SECRET_FILE} bytes, got {shown(path)}")
    try:
        return content.decode().removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError:
        raise ValueError(f"expected a file in UTF-8, got {shown(path)}") from None


def _put(fields: dict[str, Any], path: str, value: Any) -> None:
    *groups, name = path.split(".")
    for group in groups:
        fields = fields.setdefault(group, {})
    fields[name] = value
