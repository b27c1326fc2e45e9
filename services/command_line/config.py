"""`distributor config`: the reference (docs/configuration.md), and the effective settings."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from inspect import cleandoc
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from distributor_node.shared.domain.errors import CatalogUnavailable, ConfigurationError, InvalidInput
from distributor_node.shared.domain.eviction import MissCost
from distributor_node.shared.domain.objects import ObjectId
from distributor_node.shared.observability.logging import redact_text
from distributor_node.shared.settings import Settings
from distributor_node.shared.settings.load import group_of, variable_of
from distributor_node.shared.settings.model import StateStoreSettings
from distributor_node.shared.settings.sizes import format_miss_cost, format_size

_HEAD = """\
# Configuration

Generated from the settings model by `distributor config reference` (`make reference`).

Settings come from their defaults, then a YAML file (`--config FILE`), then the environment; later ones override
earlier ones. In the file, a dot is a level: `storage.limit` is `limit` below `storage`. Sizes are bytes, or a number
and a unit (`500G`, `64M`; units are powers of 1024). Durations are seconds. A relative path is relative to the working
directory of the service or command, not to the settings file. Lists in the environment are separated by commas
(`0:1,0:2`), or JSON; `peers.weights` is JSON there. Unknown names are refused, in the file and among the variables that
begin with `DISTRIBUTOR_`.
A secret can be in a file: `DISTRIBUTOR_STATE_STORE__URL_FILE=/run/secrets/redis-url`, likewise for
`DISTRIBUTOR_JOB_QUEUE__URL` and `DISTRIBUTOR_OPERATOR_API__SECRET`. In a URL, the characters `/ ? # @ [ ]` of a
password are percent-encoded.
`distributor init` writes a settings file with comments, `distributor config check` checks the settings, and
`distributor config show` prints the effective ones. `docs/settings.schema.json` is their JSON Schema, for editors.
"""
_REDACTED = "**********"
_TABLE_HEAD = "| setting | environment | default | meaning |\n|---|---|---|---|\n"


@dataclass(frozen=True, slots=True)
class _Row:
    name: str
    variable: str
    default: str
    meaning: str

    def __str__(self) -> str:
        meaning = self.meaning.replace("|", "\\|")
        return f"| `{self.name}` | `{self.variable}` | {self.default} | {meaning} |\n"


def render_reference() -> str:
    """Return the whole document: a table for the top level, then one for each section."""
    pieces = [_HEAD, "\n## Node\n\n", _TABLE_HEAD, *map(str, _rows(Settings, ""))]
    for name, field in Settings.model_fields.items():
        section = group_of(field)
        if section is not None:
            pieces += [f"\n## {name}\n\n{_one_line(section.__doc__)}\n\n", _TABLE_HEAD]
            pieces += map(str, _rows(section, f"{name}."))
    return "".join(pieces)


def _rows(model: type[BaseModel], prefix: str) -> Iterator[_Row]:
    for name, field in model.model_fields.items():
        if group_of(field) is None:
            path = prefix + name
            yield _Row(path, variable_of(path), _default(field), _one_line(field.description))


def _default(field: FieldInfo) -> str:
    text = default_text(field)
    return f"`{text}`" if text else ""


def default_text(field: FieldInfo) -> str:
    """Return the default as a settings file would have it. Empty: there is none."""
    value: Any = field.default
    if value is None or value is PydanticUndefined:
        return ""
    if isinstance(value, SecretStr):
        value = value.get_secret_value()
    elif isinstance(value, bool):
        value = str(value).lower()
    elif isinstance(value, float):
        value = f"{value:g}" if value < 1e6 else str(int(value))
    elif isinstance(value, int):
        value = format_size(value)
    elif isinstance(value, MissCost):
        value = format_miss_cost(value)
    elif isinstance(value, tuple):
        value = "[" + ", ".join(f"{item:g}" for item in value) + "]"
    return str(value)


def _one_line(text: str | None) -> str:
    return " ".join(cleandoc(text or "").split())


# The JSON Schema of a settings file, for editors: docs/settings.schema.json


def render_schema() -> str:
    """Return the schema of a settings file (JSON Schema 2020-12)."""
    schema = Settings.model_json_schema(mode="validation")
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "Settings of a distributor node"
    for properties in (schema["properties"], *(group["properties"] for group in schema["$defs"].values())):
        for field in properties.values():
            field.pop("title", None)
            if "$ref" in field or field.get("default") == _REDACTED:
                field.pop("default", None)  # of a group; of a secret
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


# What works, and should be better


def check_secret(settings: Settings) -> list[str]:
    """Return a remark on a secret of operators that the node will warn of."""
    from distributor_node.services.api.operator.auth import weak_secret

    secret = settings.operator_api.secret
    weakness = None if secret is None else weak_secret(secret.get_secret_value())
    return [] if weakness is None else [weakness]


# Whether the files and directories that settings name can be used.
#
# What is not here is a remark, because settings are often checked on another machine. So is what another user may be
# allowed to do. The manifest is read with the catalog.


def check_files(settings: Settings, *, online: bool) -> list[str]:
    """Return remarks. Raises ConfigurationError, with a line for each setting that names something unusable.

    `online`: this is the node's machine, so the secret of the fleet has to be here.
    """
    remarks, problems = [], []
    for name, check in _CHECKS.items():
        group, _, field = name.partition(".")
        path: Path | None = getattr(getattr(settings, group), field)
        if path is None or (name == _FLEET_SECRET and not settings.peers.enabled):
            continue
        try:
            remark = check(path)
        except FileNotFoundError:
            if online and name == _FLEET_SECRET:
                problems.append(f"{name}: expected a file, and {path} is not here")
                continue
            remark = f"{path} is not here, so it was not checked"
        except OSError as error:
            verb = "written" if name == _LOG_FILE else "read"
            said = f"{path} cannot be {verb}"
            if not isinstance(error, PermissionError) or name == _FLEET_SECRET:
                problems.append(f"{name}: {said}: {error.strerror}")
                continue
            remark = f"{said} by this user, so it was not checked"
        except InvalidInput as error:
            problems.append(f"{name}: {error}")
            continue
        if remark:
            remarks.append(f"{name}: {remark}")
    if problems:
        raise ConfigurationError("\n".join(problems))
    return remarks


def _check_secret(path: Path) -> str:
    from distributor_node.shared.adapters.peers import read_secret

    read_secret(path)
    return ""


def _check_made_directory(path: Path) -> str:
    """Of a directory that a service makes if it is missing."""
    nearest = _nearest(path)
    if not nearest.is_dir():
        raise InvalidInput(f"expected a directory, got {path}: {nearest} is none")
    if nearest == path and not os.access(path, os.R_OK | os.W_OK | os.X_OK):
        return f"{path} cannot be written by this user; the services have to"
    if not os.access(nearest, os.W_OK | os.X_OK):
        return f"{path} cannot be made or found by this user, below {nearest}; the services have to"
    return ""


def _nearest(path: Path) -> Path:
    """Return the path, or the nearest directory above it that this user sees."""
    return next(one for one in (path, *path.parents, Path()) if os.path.lexists(one))


def _check_log(path: Path) -> str:
    """Of a file that the API makes, in a directory that it does not make."""
    if path.is_dir():
        raise InvalidInput(f"expected a file, got the directory {path}")
    nearest = _nearest(path.parent)
    if not nearest.is_dir():
        raise InvalidInput(f"expected a file in a directory, got {path}: {nearest} is no directory")
    if not path.parent.is_dir():
        return f"the directory {path.parent} is not here, and the node does not make it"
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        return f"{path} cannot be written by this user; the API has to"
    return ""


def _check_assets(path: Path) -> str:
    """Of another node's directory, without which the node works too."""
    if not stat.S_ISDIR(path.stat().st_mode):
        raise InvalidInput(f"expected a directory, got the file {path}")
    return "" if os.access(path, os.R_OK | os.X_OK) else f"{path} cannot be read by this user"


def _check_cache_state(path: Path) -> str:
    """Of another node's file, without which the node works too."""
    from distributor_node.services.evictor.node_import import read_cache_state

    try:
        read_cache_state(path)
    except InvalidInput as error:
        return f"{path} cannot be used: {error}"
    return ""


_FLEET_SECRET = "peers.secret_file"  # noqa: S105 - a setting's name
_LOG_FILE = "log.access_file"
_CHECKS: Mapping[str, Callable[[Path], str]] = {
    _FLEET_SECRET: _check_secret,
    "storage.path": _check_made_directory,
    "storage.import_assets": _check_assets,
    "storage.import_cache_state": _check_cache_state,
    "metrics.multiprocess_dir": _check_made_directory,
    _LOG_FILE: _check_log,
}
"""By setting. Each returns a remark, or nothing. Raises OSError, or InvalidInput for what cannot be used."""


# Whether the catalog can be used: the manifest is read, and with `--online` the squid or the origin is asked.

_NO_OBJECT = ObjectId("0")


def check_catalog(settings: Settings, *, online: bool) -> list[str]:
    """Return remarks. Raises ConfigurationError for an invalid manifest, with line, entry and rule, and for a catalog
    that cannot be reached or used, if `online`.

    A manifest that is not there is an error if its directory is, or if `online`. Otherwise it is a remark, as one that
    this user may not read: settings may be checked on another machine, and by another user.
    """
    manifest = settings.catalog.manifest
    if settings.catalog.kind == "manifest" and not online and manifest is not None:
        remark = _manifest_remark(manifest)
        if remark:
            found = f"got {manifest}, which {remark}, so it was not checked"
            return [
                f"catalog.manifest: expected a file that can be read, {found} (--online makes this an error)"
            ]
    if settings.catalog.kind == "manifest" or online:
        asyncio.run(_open_catalog(settings, online=online))
    return []


def _manifest_remark(manifest: Path) -> str:
    try:
        if not manifest.exists():
            directory = manifest.absolute().parent
            # The root directory is on every machine: it does not show that this is the node's.
            if directory.is_dir() and directory != directory.parent:
                raise ConfigurationError(
                    f"catalog.manifest: expected a file, got {manifest}: {directory} is here, and has no such file"
                )
            return "is not here"
    except PermissionError:
        return "cannot be read by this user"
    return "" if os.access(manifest, os.R_OK) else "cannot be read by this user"


async def _open_catalog(settings: Settings, *, online: bool) -> None:
    import structlog

    from distributor_node.shared.runtime.factories import build_catalog

    # The result is what this command prints. What the adapters log would stand between.
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    # Without the shared cache: nothing but the catalog is to be asked.
    alone = settings.model_copy(update={"state_store": StateStoreSettings()})
    catalog = build_catalog(alone)
    await catalog.open()
    try:
        if online:
            await catalog.bucket_ids(settings.assignment.effective.worker_id)
            await catalog.look_up(_NO_OBJECT)
    except CatalogUnavailable as error:
        raise ConfigurationError(f"catalog.{_ADDRESS_OF[settings.catalog.kind]}: {error}") from error
    finally:
        await catalog.close()


_ADDRESS_OF = {"manifest": "manifest", "joystream": "squid", "origin": "origin"}


# The effective settings, in the format of a settings file, without secrets.


def show_settings(settings: Settings) -> str:
    """Return YAML. A secret that is set is `**********`, credentials in a URL are `***`."""
    fields = settings.model_dump(mode="json", exclude_none=True)
    return redact_text(yaml.safe_dump(fields, sort_keys=False, allow_unicode=True))
