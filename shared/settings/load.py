"""Reads the settings from file and environment, and explains which are wrong."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource

from distributor_node.shared.domain.errors import ConfigurationError
from distributor_node.shared.settings.model import Settings


def load_settings(file: Path | None = None, overrides: Mapping[str, Any] | None = None) -> Settings:
    """Defaults, then `file` (YAML or JSON), then the environment, then `overrides` (from the command line).

    Raises ConfigurationError with a line for each wrong setting, without the values of secrets.
    """
    from_file = _read_file(file) if file is not None else {}

    class _Layered(Settings):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return init_settings, env_settings, _FileSource(settings_cls, from_file)

    try:
        return _Layered(**dict(overrides or {}))
    except ValidationError as error:
        raise ConfigurationError("\n".join(_explain(error))) from None


def check_settings(fields: Mapping[str, Any]) -> None:
    """Raise ConfigurationError unless these are valid settings by themselves, without the environment."""

    class _Alone(Settings):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return (init_settings,)

    try:
        _Alone(**dict(fields))
    except ValidationError as error:
        raise ConfigurationError("\n".join(_explain(error))) from None


class _FileSource(PydanticBaseSettingsSource):
    """The parsed settings file. It overrides only the defaults."""

    def __init__(self, settings_cls: type[BaseSettings], fields: Mapping[str, Any]) -> None:
        super().__init__(settings_cls)
        self._fields = fields

    def get_field_value(self, field: Any, field_name: str) -> tuple[Any, str, bool]:
        return self._fields.get(field_name), field_name, False

    def __call__(self) -> dict[str, Any]:
        return dict(self._fields)


def _read_file(file: Path) -> dict[str, Any]:
    try:
        fields = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"settings file {file} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigurationError(f"settings file {file} is not valid YAML: {error}") from error
    if fields is None:
        return {}
    if not isinstance(fields, dict):
        raise ConfigurationError(
            f"settings file {file}: expected names and values at the top level, got {type(fields).__name__}"
        )
    return fields


def _explain(error: ValidationError) -> list[str]:
    lines = []
    for wrong in error.errors(include_url=False, include_context=False, include_input=False):
        path = ".".join(str(part) for part in wrong["loc"])
        message = wrong["msg"].removeprefix("Value error, ")
        lines.append(f"{path}: {message}" if path else message)
    return lines
