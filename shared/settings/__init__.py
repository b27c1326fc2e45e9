"""Settings: defaults, then a YAML file, then the environment, validated together at start."""

from distributor_node.shared.settings.load import load_settings
from distributor_node.shared.settings.model import Settings

__all__ = ["Settings", "load_settings"]
