"""The assignment that what lies on the volume was last checked against:
another one now may well make most of it strange."""

from __future__ import annotations

import json
from pathlib import Path

import structlog

from shared.adapters.volume.small_files import read_root_file, write_root_file
from shared.domain.errors import InvalidInput
from shared.domain.objects import Assignment, parse_bucket_id

NAME = "duty.json"

logger = structlog.get_logger()


def read_checked_assignment(root: Path) -> Assignment | None:
    """Blocks. None: nobody has checked yet, or the file cannot be read. VolumeError: disk trouble."""
    text = read_root_file(root, NAME)
    if text is None:
        return None
    try:
        document = json.loads(text)
        buckets, worker_id = document["buckets"], document["workerId"]
        if worker_id is not None and type(worker_id) is not int:
            raise ValueError("a worker that is no number")
        return Assignment(None if buckets is None else frozenset(map(parse_bucket_id, buckets)), worker_id)
    except (ValueError, TypeError, KeyError, RecursionError, InvalidInput) as error:
        logger.error("assignment_file_invalid", file=NAME, reason=type(error).__name__)
        return None


def write_checked_assignment(root: Path, assignment: Assignment) -> None:
    """Blocks; in one step. VolumeError if that fails."""
    buckets = None if assignment.bucket_ids is None else sorted(assignment.bucket_ids)
    write_root_file(root, NAME, json.dumps({"buckets": buckets, "workerId": assignment.worker_id}) + "\n")
