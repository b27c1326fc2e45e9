"""Settings of the operator API."""

from __future__ import annotations

from pydantic import Field, SecretStr

from shared.settings.section import Port, SettingsGroup

MIN_SECRET_LENGTH = 16
"""Characters."""


class OperatorApi(SettingsGroup):
    """The HTTP server that operators talk to. Off unless a secret is set."""

    host: str = "127.0.0.1"
    """Address to listen on. Requests are authorised, but not encrypted."""
    port: Port = 3335
    """Port to listen on; 0 takes any free one."""
    secret: SecretStr | None = Field(default=None, min_length=MIN_SECRET_LENGTH)
    """What operators sign their requests with, at least 16 characters."""
