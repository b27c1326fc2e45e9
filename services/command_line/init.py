"""`distributor init`: writes a settings file with comments, from a few questions or options."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Mapping
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
    """Write a settings file with comments. What the options do not say is asked, if there is a terminal.

    An answer that is invalid is asked for again, with the reason. An option that is invalid is an error.
    """
    _check_new(file)
    ask = _Questions(interactive=sys.stdin.isatty())
    kind = ask.kind(catalog)
    name, question, suggestion = _SOURCES[kind]
    ask.setting(f"catalog.{name}", question, source, suggestion)
    others: list[tuple[str, str, object, str]] = [
        ("storage.path", "Directory of the volume", path, "/var/lib/distributor"),
        ("storage.limit", "Storage limit", limit, "20G"),
    ]
    if kind is CatalogKind.JOYSTREAM:
        others.insert(0, ("worker_id", "Worker id", worker_id, "0"))
    # Options first: a mistake in one of them ends the command before more is asked.
    for setting, question, given, suggestion in sorted(others, key=lambda one: one[2] is None):
        ask.setting(setting, question, given, suggestion)
    if ask.yes("With Redis and RabbitMQ", servers):
        ask.chosen["state_store.url"] = "redis://localhost:6379/0"
        ask.chosen["job_queue.url"] = "amqp://localhost:5672/"
    _write(file, render_settings(ask.chosen))
    print(f"{file} is written. Check it with: distributor config check --config {file}")


class _Questions:
    """Asks for what was not given by an option. Without a terminal the suggestion is the answer."""

    def __init__(self, *, interactive: bool) -> None:
        self._interactive = interactive
        self.chosen: dict[str, Any] = {}  # valid values, by path

    def kind(self, given: CatalogKind | None) -> CatalogKind:
        def check(text: str) -> str:
            if text not in set(CatalogKind):
                raise ConfigurationError(f"catalog.kind: expected {', '.join(CatalogKind)}, got {text!r}")
            return text

        question = f"Kind of catalog ({', '.join(CatalogKind)})"
        kind = CatalogKind(self._answer(question, given, CatalogKind.MANIFEST, check))
        self.chosen["catalog.kind"] = kind.value
        return kind

    def setting(self, path: str, question: str, given: object, suggestion: str) -> None:
        """Choose a value that is valid beside those chosen before. Raises ConfigurationError for an invalid option."""
        from distributor_node.shared.settings.load import check_settings

        def check(text: str) -> int | str:
            value = int(text) if path == "worker_id" and text.isdecimal() else text
            check_settings(_nested({**self.chosen, path: value}))
            return value

        self.chosen[path] = self._answer(question, given, suggestion, check)

    def yes(self, question: str, given: bool | None) -> bool:
        if given is not None:
            return given
        return self._interactive and bool(typer.confirm(question, default=False))

    def _answer(self, question: str, given: object, suggestion: str, check: Callable[[str], Any]) -> Any:
        if given is not None or not self._interactive:
            return check(str(suggestion if given is None else given))

        def check_answer(text: str) -> Any:
            try:
                return check(text)
            except ConfigurationError as error:
                raise typer.BadParameter(str(error)) from error  # printed, and the question asked again

        return typer.prompt(question, default=str(suggestion), value_proc=check_answer)


def _check_new(file: Path) -> None:
    """Raise ConfigurationError if the file cannot be made, before anything is asked."""
    if os.path.lexists(file):
        raise _cannot_be_made(file, os.strerror(errno.EEXIST))
    if not file.parent.is_dir():
        raise _cannot_be_made(file, os.strerror(errno.ENOENT))


def _cannot_be_made(file: Path, reason: str | None) -> ConfigurationError:
    return ConfigurationError(f"{file}: expected a file that can be made, got: {reason}")


def _write(file: Path, text: str) -> None:
    """Write a new file that its owner alone can read: passwords may be added to it."""
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise _cannot_be_made(file, error.strerror) from None
    with os.fdopen(descriptor, "w", encoding="utf-8") as output:
        output.write(text)


def render_settings(chosen: Mapping[str, Any]) -> str:
    """Return a settings file: `chosen`, by path, and every other setting as a comment with its default.

    Raises ConfigurationError if the chosen ones are invalid.
    """
    from distributor_node.shared.settings.load import check_settings, group_of
    from distributor_node.shared.settings.model import Settings

    check_settings(_nested(chosen))
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


def _nested(chosen: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for path, value in chosen.items():
        above, _, name = path.rpartition(".")
        (nested.setdefault(above, {}) if above else nested)[name] = value
    return nested


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
