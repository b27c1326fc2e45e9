"""The names of all settings, and what is said about a wrong one: field, expectation, value, never a secret."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import get_args

from pydantic import BaseModel, SecretStr, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from distributor_node.shared.settings.model import FORMER_NAMES, Settings

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
    for name, field in model.model_fields.items():
        section = group_of(field)
        if section is None:
            yield prefix + name, field
        else:
            yield from _walk(section, f"{prefix}{name}.")


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
    return "text" if isinstance(value, str) else f"a {type(value).__name__}"
