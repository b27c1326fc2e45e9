"""Reads the settings: defaults, then the file, then the environment.

Then explains which are wrong, with the names that the operator has given, and without the values of secrets.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, SecretStr, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from distributor_node.shared.domain.errors import ConfigurationError
from distributor_node.shared.settings.model import FORMER_NAMES, Settings

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


# The environment


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
    """Lists are JSON, or separated by commas. Names with values are JSON. All else is left to the setting's type.

    Raises ValueError.
    """
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("expected UTF-8")
    stripped = text.strip()
    if get_origin(setting.annotation) is dict:
        return _parse_object(stripped)
    if not _is_list(setting):
        return text
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


def _parse_object(text: str) -> Any:
    try:
        found = json.loads(text, object_pairs_hook=_with_unique_names)
    except _GivenTwice:
        raise
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"expected a JSON object, got {shown(text)}")
    return found


class _GivenTwice(ValueError):
    """A name of a JSON object is given twice, as YAML cannot have it either."""


def _with_unique_names(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise _GivenTwice(f"{shown(name)} is given twice")
        found[name] = value
    return found


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


# Names of settings, and what is said of wrong ones


_CONTAINERS = (dict, list, tuple, set, frozenset)
_MAX_SHOWN = 80  # characters of a value
_CREDENTIALS = re.compile(r"//.*@", re.DOTALL)


def all_settings() -> Mapping[str, FieldInfo]:
    """Every setting by its path, such as storage.limit, in the order of the reference."""
    return dict(_walk(Settings, ""))


def former_settings() -> Mapping[str, FieldInfo]:
    """As `all_settings`, by the paths that settings had before."""
    known = all_settings()
    return {
        f"{group}.{former}": known[f"{group}.{name}"]
        for group, renamed in FORMER_NAMES.items()
        for former, name in renamed.items()
    }


def _walk(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    for name, declared in model.model_fields.items():
        group = group_of(declared)
        if group is None:
            yield prefix + name, declared
        else:
            yield from _walk(group, f"{prefix}{name}.")


def group_of(field: FieldInfo) -> type[BaseModel] | None:
    """Return the model of a group of settings. None for a setting."""
    annotation = field.annotation
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def is_secret(field: FieldInfo) -> bool:
    """Whether the value must not be shown."""
    return field.annotation is SecretStr or SecretStr in get_args(field.annotation)


def nearest(name: str, known: Iterable[str], prefix: str = "") -> str:
    """Return `; did you mean NAME?` for the known name that is nearest, or nothing if none is near.

    `prefix`: what all names begin with, which makes none of them nearer.
    """
    plain = {_letters_of(candidate, prefix): candidate for candidate in known}
    found = get_close_matches(_letters_of(name, prefix), plain, n=1, cutoff=0.7)
    return f"; did you mean {plain[found[0]]}?" if found else ""


def _letters_of(name: str, prefix: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.removeprefix(prefix).lower())


def explain(error: ValidationError, variables: Mapping[str, str]) -> list[str]:
    """Return one sentence for each wrong setting. `variables`: by path, the environment variable that gave it."""
    return [_explain_one(wrong, variables) for wrong in error.errors(include_url=False)]


def _explain_one(wrong: ErrorDetails, variables: Mapping[str, str]) -> str:
    path = _path_of(wrong["loc"])
    if not path:
        return wrong["msg"].removeprefix("Value error, ")
    known = all_settings()
    if wrong["type"] == "extra_forbidden":
        return f"{path}: unknown setting{nearest(path, known)}"
    setting_path = path.partition("[")[0]
    for name, one in known.items():
        if get_origin(one.annotation) is dict and path.startswith(f"{name}."):
            setting_path = name  # the rest of the path is a name that the operator chose
    setting = known.get(setting_path)
    if setting is None and wrong["type"] == "value_error":
        return f"{path}: {wrong['msg'].removeprefix('Value error, ')}"
    if setting is None:
        return f"{path}: expected a group of settings, got {_type_of(wrong['input'])}"
    name = f"{path} ({variables[setting_path]})" if setting_path in variables else path
    if wrong["type"] == "value_error" and isinstance(wrong["input"], _CONTAINERS):
        return f"{name}: {_without_credentials(wrong['msg'].removeprefix('Value error, '))}"
    expected = _expectation(wrong)
    if is_secret(setting):
        return f"{name}: {expected} (its value is not shown)"
    return f"{name}: {expected}, got {shown(wrong['input'])}"


def _path_of(location: Sequence[str | int]) -> str:
    """Return storage.limit, or buckets[2]."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).removeprefix(
        "."
    )


_EXPECTATIONS = {
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing_size": "a whole number of less than 4300 digits",
    "float_parsing": "a number",
    "float_type": "a number",
    "string_type": "text (in YAML, put it in quotes)",
    "path_type": "a path",
    "tuple_type": "a list",
    "frozen_set_type": "a list",
}


def _expectation(wrong: ErrorDetails) -> str:
    kind, limits = wrong["type"], wrong.get("ctx", {})
    if kind in _EXPECTATIONS:
        return f"expected {_EXPECTATIONS[kind]}"
    if kind == "literal_error":
        return f"expected {limits['expected']}"
    if kind == "string_pattern_mismatch":
        return f"expected text that matches {limits['pattern']}"
    if kind in ("string_too_short", "too_short"):
        return f"expected at least {limits['min_length']} characters"
    if kind in ("string_too_long", "too_long"):
        return f"expected at most {limits['max_length']} characters"
    for name, words in (("gt", "more than"), ("ge", "at least"), ("lt", "less than"), ("le", "at most")):
        if name in limits:
            return f"expected {words} {limits[name]:g}"
    # Of our own validators, or the library's words.
    message = wrong["msg"].removeprefix("Value error, ").partition(", got ")[0]
    return message.replace("Input should be", "expected")


def shown(value: object) -> str:
    """Return a value as it may be shown: without credentials, and not longer than a line."""
    if isinstance(value, _CONTAINERS):
        return _type_of(value)
    text = _without_credentials(str(value))
    text = text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}…"
    return repr(text) if isinstance(value, str) else text


def _without_credentials(text: str) -> str:
    return _CREDENTIALS.sub("//***@", text)


def _type_of(value: object) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, dict):
        return "names and values"
    if isinstance(value, (list, tuple, set, frozenset)):
        return "a list"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return "a number"
    return "text" if isinstance(value, str) else f"a {type(value).__name__}"
