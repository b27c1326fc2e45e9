"""The Lua scripts, read from the package."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib import resources

_PRELUDE = "records.lua"


@dataclass(frozen=True, slots=True)
class Script:
    """A whole script and the digest by which the server knows it."""

    text: str
    digest: str


def load_scripts() -> dict[str, Script]:
    """All scripts by file name, without the suffix."""
    folder = resources.files("shared.adapters.state_redis.scripts")
    prelude = (folder / _PRELUDE).read_text()
    scripts: dict[str, Script] = {}
    for file in folder.iterdir():
        if file.name.endswith(".lua") and file.name != _PRELUDE:
            text = f"{prelude}\n{file.read_text()}"
            digest = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
            scripts[file.name.removesuffix(".lua")] = Script(text, digest)
    return scripts
