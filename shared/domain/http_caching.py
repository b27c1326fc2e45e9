"""HTTP caching (RFC 9111, RFC 5861): what a shared cache stores, how long it is fresh, and what it does when it is not.

Pure: parsing and decisions. The fetcher reads an origin's response by `why_not_stored` and `freshness_of`, and keeps
the `Freshness` in the record of the object. `Freshness.use` decides about each request for it.

Credentials of clients are never sent to an origin, so section 3.5 (Authorization) does not arise.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from email.utils import formatdate
from enum import Enum, auto

from distributor_node.shared.domain.conditionals import Validators, parse_http_date
from distributor_node.shared.domain.errors import InvalidInput

MAX_DELTA = 2**31 - 1
"""Seconds. Greater numbers count as this one (RFC 9111 section 1.2.2)."""

_MAX_CACHE_CONTROL = 256  # characters that are kept and passed on
_HEURISTIC_SHARE = 10
"""Without a stated lifetime, an object is fresh for one part in ten of its age (RFC 9111 section 4.2.2)."""
_DIRECTIVE = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+)(?:=(?:\"((?:[^\"\\]|\\.)*)\"|([^\s,;\"]*)))?")
_PASSED_VARIATIONS = frozenset({"accept-encoding", "origin"})
"""We ask for identity always, and answer each origin of a page alike."""


class CacheControl:
    """The directives of a Cache-Control header (RFC 9111 section 5.2). Names are case-insensitive."""

    def __init__(self, header: str | None) -> None:
        """`header`: all lines, joined with commas. None: there is none."""
        self._values: dict[str, list[str | None]] = {}
        for match in _DIRECTIVE.finditer(header or ""):
            value = match[2] if match[2] is not None else match[3]
            self._values.setdefault(match[1].lower(), []).append(value)

    def __contains__(self, name: str) -> bool:
        """Whether there is such a directive, with or without a value. `no-cache="x"` counts as `no-cache`."""
        return name in self._values

    def seconds(self, name: str) -> int | None:
        """The value of a directive. None: there is no such directive. A malformed value or two that differ count as 0:
        the response is stale (section 4.2.1)."""
        if name not in self._values:
            return None
        stated = set(self._values[name])
        text = stated.pop() or ""
        if stated or not (text.isascii() and text.isdigit()):
            return 0
        return min(int(text[:20]), MAX_DELTA)


@dataclass(frozen=True, slots=True)
class CachingRules:
    """What holds where the origin says nothing, and bounds of what it says. Times in seconds."""

    default_ttl: int = 60  # without a stated lifetime and a date of modification
    max_ttl: int = 7 * 24 * 3600
    stale_while_revalidate: int = 10  # unless stated; not longer than the object was fresh
    stale_if_error: int = 24 * 3600  # unless stated


DEFAULT_RULES = CachingRules()


# Storing (section 3)


def why_not_stored(status: int, headers: Mapping[str, str]) -> str | None:
    """Return why a response to a GET must not be stored, in words of its header. None: it may be.

    `headers` has case-insensitive names, several lines of one name joined with commas.
    """
    control = CacheControl(headers.get("Cache-Control"))
    if status != 200:
        return f"status {status}"  # a range is stored only with the rest of a 200; a redirect is followed
    if "no-store" in control and "must-understand" not in control:  # 200 is understood (section 5.2.2.3)
        return "no-store"
    if "private" in control:
        return "private"
    validators = Validators.from_headers(headers)
    if "no-cache" in control and validators.etag is None and validators.last_modified is None:
        return "no-cache without a validator"
    varied = {name.strip().lower() for name in headers.get("Vary", "").split(",") if name.strip()}
    if varied - _PASSED_VARIATIONS:
        return f"Vary: {', '.join(sorted(varied))[:80]}"
    if "Set-Cookie" in headers and "public" not in control:
        return "Set-Cookie"
    return None


def is_useful(freshness: Freshness, validators: Validators) -> bool:
    """Whether a stored response could ever be used again: it is fresh for a while, or can be validated."""
    known = validators.etag is not None or validators.last_modified is not None
    return known or freshness.lifetime > 0 or freshness.stale_while_revalidate > 0


# Freshness (section 4.2)


class Use(Enum):
    """What to do with a stored object for one request."""

    FRESH = auto()  # serve it
    STALE = auto()  # serve it, and ask the origin at the same time
    REVALIDATE = auto()  # ask the origin first
    REFUSE = auto()  # 504: it is stale, and the client wants no request to the origin


@dataclass(frozen=True, slots=True)
class Freshness:
    """How long a stored object may be used without asking its origin. Times in whole seconds."""

    born_at: int  # POSIX time at which the origin made or validated the response, as far as known: Age counts from it
    lifetime: int
    stale_while_revalidate: int = 0  # after the lifetime
    stale_if_error: int = 0  # after the lifetime
    cache_control: str | None = None  # the origin's, passed on; None: it sent none
    checked_at: float = 0.0  # POSIX time of the origin's last answer, by our clock: rises with every answer

    def age(self, now: float) -> int:
        """The value of Age (section 5.1)."""
        return min(max(0, int(now - self.born_at)), MAX_DELTA)

    def ttl(self, now: float) -> int:
        """Seconds of freshness that are left. 0 or less: stale."""
        return self.lifetime - self.age(now)

    @property
    def stale_at(self) -> int:
        """POSIX time from which it is stale."""
        return self.born_at + self.lifetime

    @property
    def response_cache_control(self) -> str:
        """Cache-Control for clients: the origin's. Without one, the lifetime that this cache has chosen."""
        return f"max-age={self.lifetime}" if self.cache_control is None else self.cache_control

    def use(self, now: float, *, no_cache: bool = False, only_if_cached: bool = False) -> Use:
        """Decide about a request. `no_cache`, `only_if_cached`: its directives (section 5.2.1), if honoured."""
        ttl = self.ttl(now)
        if ttl > 0 and not no_cache:
            return Use.FRESH
        if not no_cache and -ttl < self.stale_while_revalidate:
            return Use.STALE
        return Use.REFUSE if only_if_cached else Use.REVALIDATE

    def may_serve_on_error(self, now: float) -> bool:
        """Whether to serve it although the origin cannot be asked (RFC 5861 section 4)."""
        ttl = self.ttl(now)
        return ttl > 0 or -ttl < self.stale_if_error

    def refreshed(
        self,
        headers: Mapping[str, str],
        stored: Validators,
        received_at: float,
        delay: float,
        rules: CachingRules = DEFAULT_RULES,
    ) -> Freshness:
        """The freshness after a 304 (section 4.3.4). Its headers replace those stored, and it may omit some."""
        names = ("Age", "Date", "Expires", "Cache-Control", "Last-Modified")
        combined = {name: headers[name] for name in names if name in headers}
        if self.cache_control is not None:
            combined.setdefault("Cache-Control", self.cache_control)
        if stored.last_modified is not None:
            combined.setdefault("Last-Modified", formatdate(stored.last_modified, usegmt=True))
        return freshness_of(combined, received_at, delay, rules)


def unknown_freshness(stored_at: int) -> Freshness:
    """Of an object stored before freshness was recorded: ask first, and serve it while the origin is down."""
    return Freshness(born_at=stored_at, lifetime=0, stale_if_error=MAX_DELTA)


def freshness_of(
    headers: Mapping[str, str], received_at: float, delay: float, rules: CachingRules = DEFAULT_RULES
) -> Freshness:
    """Read the freshness of a response. `received_at`: POSIX time; `delay`: seconds from the request to its head."""
    control = CacheControl(headers.get("Cache-Control"))
    born_at = int(received_at) - _initial_age(headers, received_at, delay)
    lifetime = (
        0 if "no-cache" in control else min(_lifetime(control, headers, received_at, rules), rules.max_ttl)
    )
    while_revalidating, on_error = (
        control.seconds("stale-while-revalidate"),
        control.seconds("stale-if-error"),
    )
    # s-maxage has the meaning of proxy-revalidate (section 5.2.2.10), unless the origin allows stale responses by name.
    strict = "s-maxage" in control
    if "must-revalidate" in control or "proxy-revalidate" in control or "no-cache" in control:
        while_revalidating = on_error = 0
    if while_revalidating is None:
        while_revalidating = 0 if strict else min(rules.stale_while_revalidate, lifetime)
    if on_error is None:
        on_error = 0 if strict else rules.stale_if_error
    return Freshness(
        born_at,
        lifetime,
        while_revalidating,
        on_error,
        _passed_on(headers.get("Cache-Control")),
        checked_at=round(received_at, 3),
    )


def _lifetime(
    control: CacheControl, headers: Mapping[str, str], received_at: float, rules: CachingRules
) -> int:
    """Section 4.2.1, and 4.2.2 where the origin states nothing."""
    for name in ("s-maxage", "max-age"):
        stated = control.seconds(name)
        if stated is not None:
            return stated
    sent_at = parse_http_date(headers.get("Date", ""))
    made_at = int(received_at) if sent_at is None else sent_at
    if "Expires" in headers:
        expires = parse_http_date(headers["Expires"])
        return 0 if expires is None else max(0, expires - made_at)
    modified_at = Validators.from_headers(headers).last_modified
    if modified_at is None or modified_at > made_at:
        return rules.default_ttl
    return (made_at - modified_at) // _HEURISTIC_SHARE


def _initial_age(headers: Mapping[str, str], received_at: float, delay: float) -> int:
    """The age on arrival, in whole seconds (section 4.2.3). A malformed Age counts as 0."""
    stated = headers.get("Age", "").strip()
    age = min(int(stated[:20]), MAX_DELTA) if stated.isascii() and stated.isdigit() else 0
    sent_at = parse_http_date(headers.get("Date", ""))
    apparent = 0 if sent_at is None else max(0, int(received_at) - sent_at)
    return max(apparent, age + int(delay))


_KNOWN_DIRECTIVES = (
    "public", "private", "max-age", "s-maxage", "no-cache", "no-store", "must-revalidate", "proxy-revalidate",
    "no-transform", "immutable", "must-understand", "stale-while-revalidate", "stale-if-error",
)  # fmt: skip


def _passed_on(header: str | None) -> str | None:
    """Cache-Control as clients get it. Of one that is long or cannot be sent, the directives that are known."""
    if header is None or (len(header) <= _MAX_CACHE_CONTROL and header.isascii() and header.isprintable()):
        return (header or "").strip() or None
    control = CacheControl(header)
    kept = []
    for name in _KNOWN_DIRECTIVES:
        if name in control:
            valued = name in ("max-age", "s-maxage") or name.startswith("stale-")
            kept.append(f"{name}={control.seconds(name)}" if valued else name)
    return ", ".join(kept) or None


def passed_cache_control(headers: Mapping[str, str]) -> str:
    """Cache-Control for clients of a response that is not stored: the origin's, or `no-store` if it does not say."""
    return _passed_on(headers.get("Cache-Control")) or "no-store"


# Asking again (section 4.3)


def conditional_headers(validators: Validators) -> dict[str, str]:
    """Headers of a request that validates (section 4.3.1). Empty: there is no validator to send."""
    headers = {}
    if validators.etag is not None:
        headers["If-None-Match"] = validators.etag
    if validators.last_modified is not None:
        headers["If-Modified-Since"] = formatdate(validators.last_modified, usegmt=True)
    return headers


class Validation(Enum):
    """What the response to a validating request means (section 4.3.3)."""

    UNCHANGED = auto()
    REPLACED = auto()  # another version, or one that cannot be told apart: fetch it
    GONE = auto()  # the origin has no such object, or refuses it
    FAILED = auto()  # nothing can be concluded


_GONE = frozenset({401, 403, 404, 410, 451})


def validate(stored: Validators, status: int, received: Validators) -> Validation:
    """Decide what a response says of a stored object."""
    if status == 304:
        # A tag of another version means that the stored one is not the one validated (section 4.3.4).
        differs = None not in (stored.strong_etag, received.strong_etag) and stored.etag != received.etag
        return Validation.REPLACED if differs else Validation.UNCHANGED
    if status in _GONE:
        return Validation.GONE
    if status != 200:
        return Validation.FAILED
    # A server that ignores preconditions sends the object again: an equal strong tag proves that nothing has changed.
    same = stored.strong_etag is not None and stored.strong_etag == received.strong_etag
    return Validation.UNCHANGED if same else Validation.REPLACED


# The JSON form, part of the record on the volume


def encode_freshness(freshness: Freshness | None) -> dict[str, object]:
    """The fields of a record. Empty for an object that does not become stale."""
    if freshness is None:
        return {}
    windows = (freshness.lifetime, freshness.stale_while_revalidate, freshness.stale_if_error)
    return {
        "fresh": [freshness.born_at, *windows],
        "checked_at": freshness.checked_at,
        "cache_control": freshness.cache_control,
    }


def decode_freshness(fields: Mapping[str, object]) -> Freshness | None:
    """Read what `encode_freshness` wrote. Raises InvalidInput."""
    times, control = fields.get("fresh"), fields.get("cache_control")
    if times is None:
        return None
    if not (isinstance(times, list) and len(times) == 4 and all(type(value) is int for value in times)):
        raise InvalidInput(f"record: fresh: expected four integers, got {repr(times)[:40]}")
    if not (control is None or (isinstance(control, str) and control.isascii() and control.isprintable())):
        raise InvalidInput(
            f"record: cache_control: expected a printable string or null, got {repr(control)[:40]}"
        )
    checked_at = fields.get("checked_at")
    if not isinstance(checked_at, int | float) or isinstance(checked_at, bool):
        raise InvalidInput(f"record: checked_at: expected POSIX seconds, got {repr(checked_at)[:40]}")
    return replace(Freshness(*times), cache_control=control, checked_at=float(checked_at))
