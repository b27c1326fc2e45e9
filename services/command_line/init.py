"""`distributor init`: writes a settings file with comments, from a few questions or options."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from enum import StrEnum
from inspect import cleandoc
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Annotated, Any

import typer

from distributor_node.shared.domain.errors import ConfigurationError

if TYPE_CHECKING:
    from pydantic import BaseModel

_WIDTH = 100


class CatalogKind(StrEnum):
    """Where the node learns which objects exist."""

    MANIFEST = "manifest"
    ORIGIN = "origin"
    JOYSTREAM = "joystream"


# The question about what each kind needs: setting, question, suggestion.
_SOURCES = {
    CatalogKind.MANIFEST: ("manifest", "Manifest file", "/etc/distributor/manifest.yaml"),
    CatalogKind.ORIGIN: ("origin", "URL template of the origin, with {id}", "https://media.example/{id}"),
    CatalogKind.JOYSTREAM: (
        "squid",
        "GraphQL endpoint of the Storage-Squid",
        "http://localhost:4352/graphql",
    ),
}


def init(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="The file to write. It must not exist.")
    ] = Path("settings.yaml"),
    catalog: Annotated[CatalogKind | None, typer.Option(help="Kind of catalog.")] = None,
    source: Annotated[
        str | None, typer.Option(help="The manifest file, the origin's URL template or the squid's endpoint.")
    ] = None,
    worker_id: Annotated[int | None, typer.Option(min=0, help="Worker on the Joystream network.")] = None,
    path: Annotated[Path | None, typer.Option(help="Directory of the volume.")] = None,
    limit: Annotated[str | None, typer.Option(help="Storage limit, such as 500G.")] = None,
    servers: Annotated[
        bool | None,
        typer.Option(
            "--servers/--standalone", help="With Redis and RabbitMQ, or one process without servers."
        ),
    ] = None,
) -> None:
    """Write a settings file with comments. What the options do not say is asked, if there is a terminal."""
    ask = _Questions(interactive=sys.stdin.isatty())
    kind = CatalogKind(
        ask.text("Kind of catalog (manifest, origin, joystream)", catalog, CatalogKind.MANIFEST)
    )
    name, question, suggestion = _SOURCES[kind]
    chosen: dict[str, Any] = {
        "catalog.kind": kind.value,
        f"catalog.{name}": ask.text(question, source, suggestion),
    }
    if kind is CatalogKind.JOYSTREAM:
        worker = ask.text("Worker id", worker_id, "0")
        chosen["worker_id"] = int(worker) if worker.isdecimal() else worker
    chosen["storage.path"] = ask.text("Directory of the volume", path, "/var/lib/distributor")
    chosen["storage.limit"] = ask.text("Storage limit", limit, "20G")
    if ask.yes("With Redis and RabbitMQ", servers):
        chosen["state_store.url"] = "redis://localhost:6379/0"
        chosen["job_queue.url"] = "amqp://localhost:5672/"
    _write(file, render_settings(chosen))
    print(f"{file} is written. Check it with: distributor config check --config {file}")


class _Questions:
    """Asks for what was not given by an option. Without a terminal the suggestion is the answer."""

    def __init__(self, *, interactive: bool) -> None:
        self._interactive = interactive

    def text(self, question: str, given: object, suggestion: str) -> str:
        if given is not None:
            return str(given)
        return str(typer.prompt(question, default=str(suggestion))) if self._interactive else str(suggestion)

    def yes(self, question: str, given: bool | None) -> bool:
        if given is not None:
            return given
        return self._interactive and bool(typer.confirm(question, default=False))


def _write(file: Path, text: str) -> None:
    """Write a new file that its owner alone can read: passwords may be added to it."""
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise ConfigurationError(f"{file}: expected a file that can be made, got: {error.strerror}") from None
    with os.fdopen(descriptor, "w", encoding="utf-8") as output:
        output.write(text)


def render_settings(chosen: Mapping[str, Any]) -> str:
    """Return a settings file: `chosen`, by path, and every other setting as a comment with its default.

    Raises ConfigurationError if the chosen ones are invalid.
    """
    from distributor_node.shared.settings.load import check_settings, group_of
    from distributor_node.shared.settings.model import Settings

    nested: dict[str, Any] = {}
    for path, value in chosen.items():
        above, _, name = path.rpartition(".")
        (nested.setdefault(above, {}) if above else nested)[name] = value
    check_settings(nested)
    lines = [
        "# Settings of a distributor node. Those in comments have their default. Secrets can be given by the"
    ]
    lines += ["# environment instead, also as files: docs/configuration.md.", ""]
    for name, field in Settings.model_fields.items():
        group = group_of(field)
        if group is None:
            lines += _setting(name, field, chosen.get(name), "")
    for name, field in Settings.model_fields.items():
        group = group_of(field)
        if group is not None:
            lines += ["", *_comment(group.__doc__ or "", ""), *_group(name, group, chosen)]
    return "\n".join(lines) + "\n"


def _group(name: str, group: type[BaseModel], chosen: Mapping[str, Any]) -> list[str]:
    prefix = f"{name}."
    is_chosen = any(path.startswith(prefix) for path in chosen)
    lines = [f"{name}:" if is_chosen else f"#{name}:"]
    for setting, field in group.model_fields.items():
        lines += _setting(setting, field, chosen.get(prefix + setting), "  ")
    return lines


def _setting(name: str, field: Any, value: Any, indent: str) -> list[str]:
    from pydantic import SecretStr

    from distributor_node.services.command_line.config import default_text

    lines = _comment(field.description or "", indent)
    if value is None:
        default = default_text(field)
        if isinstance(field.default, (str, Path, SecretStr)):
            default = _as_yaml(default)
        return [*lines, f"{indent}#{name}: {default}".rstrip()]
    return [*lines, f"{indent}{name}: {_as_yaml(value)}"]


def _as_yaml(value: Any) -> str:
    import yaml

    text: str = yaml.safe_dump(value, default_flow_style=True, width=10_000)
    return text.removesuffix("\n").removesuffix("\n...")


def _comment(text: str, indent: str) -> list[str]:
    return [f"{indent}# {line}" for line in wrap(" ".join(cleandoc(text).split()), _WIDTH)]
