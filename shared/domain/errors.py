"""The error tree.

Callers ask two questions of an error: is it worth trying again, and whose fault is it?

    DistributorError
    ├── InvalidInput              client   final   a value that breaks a rule (id, hash, range, job, record)
    │   └── InvalidJob            client   final   a message on the job queue that is no job
    ├── ConfigurationError        operator final   settings that cannot work; raised at start only
    ├── CatalogUnavailable        catalog  again   the catalog gave no usable answer in time
    ├── StateStoreUnavailable     state    again   the state store gave no answer in time
    ├── JobQueueUnavailable       queue    again   the broker did not confirm a message in time
    ├── VolumeError               volume   again   the volume refused an operation
    │   └── VolumeFull            volume   again   no space left on the device (ENOSPC, EDQUOT)
    └── SourceError               source   again   one source failed to give one object
        ├── SourceUnreachable     source   again   no connection, broken connection, TLS trouble
        ├── SourceTooSlow         source   again   no headers, no bytes, or too few of them, in time
        ├── SourceRefused         source   again   an answer that is no success (403, 404, 500, a redirect, …)
        ├── SourceWrong           source   again   an answer that contradicts the catalog (size, hash, encoding)
        └── AllSourcesFailed      source   again   every source of an object failed; carries the error of each
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum


class Fault(StrEnum):
    """Whose fault an error is."""

    CLIENT = "client"
    OPERATOR = "operator"
    CATALOG = "catalog"
    STATE_STORE = "state_store"
    JOB_QUEUE = "job_queue"
    VOLUME = "volume"
    SOURCE = "source"


class DistributorError(Exception):
    """Base of all errors that the node raises on purpose."""

    worth_retrying: bool = False
    fault: Fault = Fault.OPERATOR


class InvalidInput(DistributorError):
    """A value from outside breaks a rule; the message says which."""

    fault = Fault.CLIENT


class InvalidJob(InvalidInput):
    """A message on the job queue that cannot be read as a job."""


class ConfigurationError(DistributorError):
    """Settings that cannot work; the message names the setting and the reason."""

    fault = Fault.OPERATOR


class CatalogUnavailable(DistributorError):
    """The catalog gave no usable answer in time."""

    worth_retrying = True
    fault = Fault.CATALOG


class StateStoreUnavailable(DistributorError):
    """The state store gave no answer in time."""

    worth_retrying = True
    fault = Fault.STATE_STORE


class JobQueueUnavailable(DistributorError):
    """The job queue did not take a message in time."""

    worth_retrying = True
    fault = Fault.JOB_QUEUE


class VolumeError(DistributorError):
    """The volume refused an operation."""

    worth_retrying = True
    fault = Fault.VOLUME


class VolumeFull(VolumeError):
    """The device behind the volume has no space left, whatever the storage limit says."""


class SourceError(DistributorError):
    """One source failed to give one object; another source may do better."""

    worth_retrying = True
    fault = Fault.SOURCE

    reason: str = "failed"


class SourceUnreachable(SourceError):
    """No connection, or one that broke. `waited`: all the time that there is for a connection went by."""

    reason = "unreachable"

    def __init__(self, message: str, *, waited: bool = False) -> None:
        super().__init__(message)
        self.waited = waited


class SourceTooSlow(SourceError):
    """No headers, no bytes, or too few bytes, in time."""

    reason = "too_slow"


class SourceRefused(SourceError):
    """The source answered, but not with the object."""

    reason = "refused"

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class SourceWrong(SourceError):
    """The source's answer contradicts what the catalog says of the object."""

    reason = "wrong"


class AllSourcesFailed(SourceError):
    """Every source of an object failed, or none is known. `errors`: the last error of each, by URL."""

    reason = "all_failed"

    def __init__(self, errors: Mapping[str, SourceError]) -> None:
        told = [f"{type(error).__name__}: {error}" for error in errors.values()]
        super().__init__("; ".join(told) if told else "no source is known")
        self.errors = dict(errors)

    @property
    def too_slow(self) -> bool:
        """True if slowness is all that was wrong."""
        return bool(self.errors) and all(isinstance(error, SourceTooSlow) for error in self.errors.values())
