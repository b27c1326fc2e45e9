"""The error tree.

The second column says where the fault is, the third whether it is worth retrying.

    DistributorError
    ├── InvalidInput              client   final   a value that breaks a rule (id, hash, range, job, record)
    │   └── InvalidJob            client   final   a message on the job queue that is not a valid job
    ├── ConfigurationError        operator final   settings that cannot work; raised at start only
    ├── CatalogUnavailable        catalog  retry   no usable response from the catalog in time
    │   ├── ObjectUnavailable     catalog  retry   no usable response for one object; others may have one
    │   ├── LookupRefused         client   retry   too many look-ups wait for the catalog
    │   ├── ResponseTooLarge      catalog  retry   a response above its size limit (Joystream adapter)
    │   ├── QueryFailed           catalog  retry   the squid responded with errors (Joystream adapter)
    │   └── QueryRejected         catalog  retry   the squid does not support the query (Joystream adapter)
    ├── StateStoreUnavailable     state    retry   no response from the state store in time
    ├── JobQueueUnavailable       queue    retry   the broker did not confirm a message in time
    ├── VolumeError               volume   retry   an operation on the volume failed
    │   ├── VolumeFull            volume   retry   no space left on the device (ENOSPC, EDQUOT)
    │   ├── TooManyOpenFiles      process  retry   this process has no descriptor left (EMFILE, ENFILE)
    │   └── PartialHeld           volume   retry   another writer has the partial file open (shared/adapters/volume)
    └── SourceError               source   retry   one source failed to send one object
        ├── SourceUnreachable     source   retry   no connection, a broken connection, a TLS failure
        ├── SourceTooSlow         source   retry   no headers, no bytes, or too few bytes, in time
        ├── SourceRefused         source   retry   a status other than success (403, 404, 500, a redirect, …)
        ├── SourceWrong           source   retry   a response that contradicts the catalog (size, hash, encoding)
        │   ├── VersionChanged        source   retry   another version of the object than the one expected
        │   └── AllSourcesCorrupt     source   retry   no source sent the correct bytes (services/fetcher)
        └── AllSourcesFailed      source   retry   every source of an object failed; has the error of each
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping


class DistributorError(Exception):
    """Base class of all errors that the node raises."""

    worth_retrying: bool = False


class InvalidInput(DistributorError):
    """A value from outside breaks a rule. The message says which one."""


class InvalidJob(InvalidInput):
    """A message on the job queue is not a valid job."""


class ConfigurationError(DistributorError):
    """Settings cannot work. The message names the setting and the reason."""


class CatalogUnavailable(DistributorError):
    """The catalog gave no usable response in time."""

    worth_retrying = True


class QueryRejected(CatalogUnavailable):
    """The catalog's server does not support a field, argument or type of a query: it has another version."""


class ObjectUnavailable(CatalogUnavailable):
    """The catalog's server gave no usable response for one object. That does not mean that it is down."""

    worth_retrying = True


class LookupRefused(CatalogUnavailable):
    """Too many look-ups wait for the catalog, which may work well. `reason` is a label of metrics."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class StateStoreUnavailable(DistributorError):
    """The state store did not respond in time."""

    worth_retrying = True


class JobQueueUnavailable(DistributorError):
    """The broker did not confirm a message in time."""

    worth_retrying = True


class VolumeError(DistributorError):
    """An operation on the volume failed."""

    worth_retrying = True


class VolumeFull(VolumeError):
    """The device of the volume has no space left, although the storage limit allows more."""


class TooManyOpenFiles(VolumeError):
    """No descriptor is left for a file or a connection: a fault of this process or machine, not of disk or source."""


class SourceError(DistributorError):
    """One source failed to send one object. Another source may succeed."""

    worth_retrying = True

    reason: str = "failed"  # label of metrics and logs


class SourceUnreachable(SourceError):
    """There was no connection, or it broke. `timed_out`: the time limit for connecting was reached."""

    reason = "unreachable"

    def __init__(self, message: str, *, timed_out: bool = False) -> None:
        super().__init__(message)
        self.timed_out = timed_out


class SourceClosed(SourceUnreachable):
    """The source closed the connection while its response was not read, or soon after. Not a failure of the source."""

    reason = "closed"


class SourceTooSlow(SourceError):
    """No headers, no bytes, or too few bytes arrived in time."""

    reason = "too_slow"


class SourceOutpaced(SourceTooSlow):
    """Another source is expected to send the rest at least twice as fast. Not a failure of this source."""

    reason = "outpaced"


class SourceRefused(SourceError):
    """The source responded, but without the object."""

    reason = "http_error"

    def __init__(self, message: str, status: int, retry_after: str | None = None) -> None:
        """`retry_after`: its header of this name."""
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after


class SourceWrong(SourceError):
    """The source's response contradicts the catalog's description of the object."""

    reason = "invalid_response"


class SourceIgnoresRange(SourceWrong):
    """The source sends the object from its first byte on, and the range begins too far from there."""


class VersionChanged(SourceWrong):
    """The source sends another version of the object than the one expected. `of_size`: its size differs."""

    def __init__(self, message: str, *, of_size: bool = False) -> None:
        super().__init__(message)
        self.of_size = of_size


class NotStorable(SourceError):
    """The source sends the object, and forbids to store it. `why`: by which header."""

    reason = "not_storable"

    def __init__(self, why: str) -> None:
        super().__init__(f"must not be stored: {why}")
        self.why = why


class SourceEncoded(SourceWrong):
    """The source sends the object in a content coding although identity was asked for."""

    def __init__(self, encoding: str) -> None:
        super().__init__(f"Content-Encoding: expected identity, got {encoding}")
        self.encoding = encoding


_ABOUT_THE_OBJECT = frozenset({401, 403, 404, 410, 416, 451})
"""Statuses that say something of one object, and contradict a catalog that says that the source holds it."""


class AllSourcesFailed(SourceError):
    """Every source of an object failed, or it has no source. `errors`: the last error of each, by URL.

    `home`: what the node of the fleet failed with that was to fetch it. None: none was asked. `peers`: the URLs of
    copies at other nodes, which are no sources of their own.
    """

    reason = "all_failed"

    def __init__(
        self,
        errors: Mapping[str, SourceError],
        home: SourceError | None = None,
        peers: Collection[str] = (),
    ) -> None:
        self.home = home
        self._peers = peers
        reasons = [f"{type(error).__name__}: {error}" for error in errors.values()]
        super().__init__("; ".join(reasons) if reasons else "the object has no source")
        self.errors = dict(errors)

    @property
    def too_slow(self) -> bool:
        """Whether every source failed because it was too slow."""
        return bool(self.errors) and all(isinstance(error, SourceTooSlow) for error in self.errors.values())

    @property
    def ranges_ignored(self) -> bool:
        """Whether every source ignored a range that begins too far from the first byte, whatever peers said."""
        of_sources = [error for url, error in self.errors.items() if url not in self._peers]
        return bool(of_sources) and all(isinstance(error, SourceIgnoresRange) for error in of_sources)

    @property
    def has_source_in_order(self) -> bool:
        """Whether a source ignored such a range: it has the object, and sends it from its first byte on alone."""
        return any(isinstance(error, SourceIgnoresRange) for error in self.errors.values())

    @property
    def contradicts_catalog(self) -> bool:
        """Whether a source is evidence that the catalog's description is outdated: of the size, version or place."""
        return any(
            isinstance(error, VersionChanged)
            or (isinstance(error, SourceRefused) and error.status in _ABOUT_THE_OBJECT)
            for error in self.errors.values()
        )

    @property
    def not_storable(self) -> NotStorable | None:
        """The answer of a source that forbids to store the object."""
        found = (error for error in self.errors.values() if isinstance(error, NotStorable))
        return next(found, None)

    @property
    def encoding(self) -> str | None:
        """The content coding of a source that sends no other one."""
        found = (error.encoding for error in self.errors.values() if isinstance(error, SourceEncoded))
        return next(found, None)

    @property
    def contradicts_size(self) -> bool:
        """Whether the object has another size than the catalog says."""
        return any(isinstance(error, VersionChanged) and error.of_size for error in self.errors.values())


def in_words(error: Exception) -> str:
    """What went wrong, without the number that the operating system has for it."""
    return re.sub(r"^\[Errno -?[0-9]+\] ", "", str(error)) or type(error).__name__
