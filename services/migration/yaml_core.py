"""YAML as the existing node reads it: version 1.2, whose plain words mean less than PyYAML's.

There `0:1` is text, not 60 to the base of sixty, and `off`, `no` or a date are texts as well.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

_INTEGER = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", re.ASCII)
_NUMBER = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", re.ASCII)
_WORDS: dict[str, bool | None] = {
    "": None, "~": None, "null": None, "Null": None, "NULL": None,
    "true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False,
}  # fmt: skip
_PLAIN = "tag:yaml.org,2002:plain"


def read_yaml(text: str) -> Any:
    """The only document of a text. Raises yaml.YAMLError, ValueError."""
    return yaml.load(text, Loader=_CoreLoader)  # noqa: S506 - a SafeLoader that constructs even less


class _CoreLoader(yaml.SafeLoader):
    """Scalars by the core schema (YAML 1.2.2, 10.3.2), without infinity and what is no number."""

    yaml_implicit_resolvers: dict[str, Any] = {None: [(_PLAIN, re.compile(""))]}  # type: ignore[dict-item]  # noqa: RUF012


def _plain(_: yaml.SafeLoader, node: yaml.ScalarNode) -> Any:
    text = node.value
    if text in _WORDS:
        return _WORDS[text]
    if _INTEGER.fullmatch(text):
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
    return float(text) if _NUMBER.fullmatch(text) else text


_CoreLoader.add_constructor(_PLAIN, _plain)
