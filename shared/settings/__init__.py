"""Settings: defaults, then a YAML file, then the environment, validated together at start."""

from shared.settings.load import load_settings
from shared.settings.model import Settings

__all__ = ["Settings", "load_settings"]
