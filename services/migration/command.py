"""`distributor import-config`: the existing node's configuration file, printed as ours."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import yaml

from services.migration.existing_configuration import read_existing
from services.migration.translation import translate
from shared.settings.load import check_settings

_HEAD = """\
# Written by `distributor import-config` from {file}.
# One process: distributor standalone --config THIS_FILE. For separate services add state_store.url (redis://…) and
# job_queue.url (amqp://…). Storage nodes at private addresses are not asked: where yours are at such, change
# catalog.refuse_private_sources. Everything that can be set: docs/configuration.md.
"""


def import_configuration(file: Path, environment: Mapping[str, str]) -> tuple[str, list[str]]:
    """Our settings as YAML, and remarks for whoever runs this. ConfigurationError if they could not work."""
    translation = translate(read_existing(file, environment), file.resolve().parent)
    check_settings(translation.settings)
    text = yaml.safe_dump(translation.settings, sort_keys=False, allow_unicode=True)
    remarks = [f"{name} {remark}" for name, remark in translation.remarks.items()]
    return _HEAD.format(file=file.name) + text, remarks
