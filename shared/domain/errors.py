"""The error tree.

Callers ask of an error whether it is worth trying again; whose fault it is, its kind says.

    DistributorError
    ├── InvalidInput              client   final   a value that breaks a rule (id, hash, range, job, record)
    │   └── InvalidJob            client   final   a message on the job queue that is no job
    ├── ConfigurationError        operator final   settings that cannot work; raised at start only
    ├── CatalogUnavailable        catalog  again   the catalog gave no usable answer in time
    │   ├── ResponseTooLarge      catalog  again   an answer of more bytes than are read (its Joystream adapter)
    │   └── QueryRejected         catalog  again   errors instead of an answer (its Joystream adapter)
    ├── StateStoreUnavailable     state    again   the state store gave no answer in time
    ├── JobQueueUnavailable       queue    again   the broker did not confirm a message in time
    ├── VolumeError               volume   again   the volume refused an operation
    │   ├── VolumeFull            volume   again   no space left on the device (ENOSPC, EDQUOT)
    │   └── PartialHeld           volume   again   another writer has the partial file open (shared/adapters/volume)
    └── SourceError               source   again   one source failed to give one object
        ├── SourceUnreachable     source   again   no connection, broken connection, TLS trouble
        ├── SourceTooSlow         source   again   no headers, no bytes, or too few of them, in time
        ├── SourceRefused         source   again   an answer that is no success (403, 404, 500, a redirect, …)
        ├── SourceWrong           source   again   an answer that contradicts the catalog (size, hash, encoding)
        │   └── AllSourcesCorrupt     source   again   no source gave the right bytes (services/fetcher)
        └── AllSourcesFailed      source   again   every source of an object failed; carries the error of each
"""

from __future__ import annotations

from collections.abc import Mapping


class DistributorError(Exception):
    """Base of all errors that the node raises on purpose."""

    worth_retrying: bool = False


class InvalidInput(DistributorError):
    """A value from outside breaks a rule; the message says which."""


class InvalidJob(InvalidInput):
    """A message on the job queue that cannot be read as a job."""


class ConfigurationError(DistributorError):
    """Settings that cannot work; the message names the setting and the reason."""


class CatalogUnavailable(DistributorError):
    """The catalog gave no usable answer in time."""

    worth_retrying = True


class StateStoreUnavailable(DistributorError):
    """The state store gave no answer in time."""

    worth_retrying = True


class JobQueueUnavailable(DistributorError):
    """The job queue did not take a message in time."""

    worth_retrying = True


class VolumeError(DistributorError):
    """The volume refused an operation."""

    worth_retrying = True


class VolumeFull(VolumeError):
    """The device behind the volume has no space left, whatever the storage limit says."""


class SourceError(DistributorError):
    """One source failed to give one object; another source may do better."""

    worth_retrying = True

    reason: str = "failed"


class SourceUnreachable(SourceError):
    """No connection, or one that broke. `timed_out`: all the time that there is for a connection went by."""

    reason = "unreachable"

    def __init__(self, message: str, *, timed_out: bool = False) -> None:
        super().__init__(message)
        self.timed_out = timed_out


class SourceTooSlow(SourceError):
    """No headers, no bytes, or too few bytes, in time."""

    reason = "too_slow"


class SourceRefused(SourceError):
    """The source answered, but not with the object."""

    reason = "http_error"

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class SourceWrong(SourceError):
    """The source's answer contradicts what the catalog says of the object."""

    reason = "invalid_response"


class AllSourcesFailed(SourceError):
    """Every source of an object failed, or none is known. `errors`: the last error of each, by URL."""

    reason = "all_failed"

    def __init__(self, errors: Mapping[str, SourceError]) -> None:
        reasons = [f"{type(error).__name__}: {error}" for error in errors.values()]
        super().__init__("; ".join(reasons) if reasons else "no source is known")
        self.errors = dict(errors)

    @property
    def too_slow(self) -> bool:
        """True if slowness is all that was wrong."""
        return bool(self.errors) and all(isinstance(error, SourceTooSlow) for error in self.errors.values())
