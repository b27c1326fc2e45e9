"""The settings in force, as a file that could be given to --config, without their secrets."""

from __future__ import annotations

import yaml

from shared.observability.logging import redact_text
from shared.settings import Settings


def show_settings(settings: Settings) -> str:
    """YAML. A secret that is set shows as `**********`, credentials in a URL as `***`."""
    fields = settings.model_dump(mode="json", exclude_none=True)
    return redact_text(yaml.safe_dump(fields, sort_keys=False, allow_unicode=True))
